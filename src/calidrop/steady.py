"""Decode steps recorded once and replayed: on a GPU, one CUDA graph in place of thousands of launches from Python.

A recorded step does the same to the same memory, so what changes from step to step is on the device, in place:

* windows are fixed (`Window.fixed`), and the column of the next token is a number on the device (`LayerKV.column`);
* tensors that a step replaced (parts of a cache replace tensors, they do not write into them) are copied to where they
  were before; what layers keep beside keys and values transformers writes in place;
* what makes shapes jump (a flush, the cut of a bounded layer, a full window) happens between steps, from Python. Where
  all shapes are what they were, as under a budget, the result is copied to where it was; else steps are recorded anew.

A step that cannot be recorded, because it asks the host or because its shapes grow, runs from Python as it would have;
`Steady.why` has the reason. Nothing here knows a method.
"""

from __future__ import annotations

import functools
import operator
import weakref
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from calidrop.state import State, outline, swap

if TYPE_CHECKING:
    from calidrop.cache import KVCache
    from calidrop.layer import LayerKV
    from calidrop.store import Late

ROOM = 256  # columns that a window is given at a time where nothing flushes it
TRIES = 64  # steps that led to no recording, before it is given up
Recorder = Callable[[Callable[[], Any]], tuple[Any, Callable[[], None]]]
"""Runs a function once, for good; gives what it returned, and how to run it again with results in the same memory."""


def cuda_graph(fn: Callable[[], Any]) -> tuple[Any, Callable[[], None]]:
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        out = fn()
    graph.replay()  # recording runs nothing
    return out, graph.replay


RECORDERS: dict[str, Recorder] = {"cuda": cuda_graph}


class OfCache:
    """What a cache has, and what asks it: weakly, as neither may keep the other's memory."""

    def __init__(self, cache: KVCache):
        self._cache = weakref.ref(cache)

    @property
    def cache(self) -> KVCache:
        cache = self._cache()
        assert cache is not None
        return cache


class Steady(OfCache):
    """The steps of one cache. why: what stood in the way of recording last. recorded: how often steps were."""

    def __init__(self, cache: KVCache, device: torch.device):
        super().__init__(cache)
        self.device = device
        self.why, self.recorded, self.tries = "", 0, 0
        self.inputs: dict[str, Any] = {}
        self.held: list[list[Tensor]] = []
        self.beside: list[Tensor] = []
        self.told: list[Any] = []
        self.returned: list[str] = []
        self.inference = False  # whether inference mode was on as memory was fixed
        self.wished: Callable[[], list[bool]] = list
        self.drop()

    def drop(self) -> None:
        """Forget what was recorded; memory stays where it is."""
        self.wishes: Tensor | None = None
        self.out: Any = None
        self.again: Callable[[], None] | None = None

    @property
    def layers(self) -> list[LayerKV]:
        return self.cache.layers_here

    def describe(self) -> str:
        how = "replayed" if self.again is not None else "from Python"
        return f"{how}, recorded {self.recorded} times{f' ({self.why})' if self.why else ''}"

    def ready(self) -> bool:
        """Whether steps can be recorded as far as is known."""
        return self.tries < TRIES and all(len(layer.state.window) for layer in self.layers) and not self._refused()

    def _refused(self) -> bool:
        """Whether a store says that its steps cannot be recorded."""
        stores = (layer.state.store for layer in self.layers)
        why = next((x.unsteady for x in stores if x is not None and x.unsteady), "")
        self.why = why or self.why
        return bool(why)

    def __call__(self, run: Callable[..., Any], given: dict[str, Any]) -> Any:
        """One step: run(**given), whose tensors may lie elsewhere at every call."""
        self._fix(given)
        self._serve()
        if self.again is not None:
            self.again()
            for layer in self.layers:
                layer.stepped()
            out = self.out
        else:
            step = functools.partial(self._step, run)
            out = self._first(step) if self.out is None else self._recorded(step)
        if out is None:
            return run(**given)
        said = {n: x.clone() if isinstance(x, Tensor) else x for n, x in out.items()}
        out = type(out)(**said, **dict.fromkeys(self.returned, self.cache))
        self.wished = _later(self.wishes)
        self._settle({i for i, layer in enumerate(self.layers) if layer.between_steps(ROOM)})
        if any(layer.full for layer in self.layers):
            self.release()  # the next step gets more room
        return out

    def _first(self, step: Callable[[], tuple[Any, str]]) -> Any:
        """From Python, which also compiles the kernels a step needs. If it changed no shape, the next is recorded."""
        out, why = step()
        if why:
            self._hold()
            self.why, self.tries = why, self.tries + 1
        else:
            self.out = out
        return out

    def _recorded(self, step: Callable[[], tuple[Any, str]]) -> Any:
        """None where that failed and nothing was done."""
        before, beside = [layer.state.fork() for layer in self.layers], self.cache.states()
        self.drop()
        try:
            (self.out, why), self.again = RECORDERS[self.device.type](step)
            if why:
                raise RuntimeError(why)
        except Exception as error:
            self.why, self.tries = f"{type(error).__name__}: {str(error).splitlines()[0]}", TRIES
            for layer, state in zip(self.layers, before, strict=True):
                layer.state = state  # type: ignore[assignment]
            self.cache.put_states(beside)
            self.release()
            return None
        self.recorded, self.tries = self.recorded + 1, 0
        return self.out

    def _step(self, run: Callable[..., Any]) -> tuple[Any, str]:
        """A step from Python, and why it may not be repeated."""
        for layer in self.layers:
            layer.column = self.column
        try:
            whole = run(**self.inputs)
        finally:
            for layer in self.layers:
                layer.column = None
        # without the cache, which has this: its memory would wait for the garbage collector
        self.returned = [n for n, x in whole.items() if x is self.cache]
        out = type(whole)(**{n: x for n, x in whole.items() if n not in self.returned})
        self.column.add_(1)
        why = self._put_back(range(len(self.layers)))
        self.wishes = self._wishes()
        return out, why

    # ---- between steps

    def _late(self) -> list[tuple[int, Late]]:
        """Of each layer, what wants something."""
        stores = ((i, layer.state.store) for i, layer in enumerate(self.layers))
        return [(i, x) for i, store in stores if store for x in store.late() if x.wanted is not None]

    def _wishes(self) -> Tensor | None:
        """bool, whether each of them does."""
        wanted = [x.wanted.any() for _, x in self._late() if x.wanted is not None]
        return torch.stack(wanted) if wanted else None

    def _serve(self) -> None:
        """What was wanted by the last step. The host learns it for all layers at once."""
        wanted = self.wished()
        late = self._late()
        if len(wanted) == len(late):
            self._settle({i for (i, x), yes in zip(late, wanted, strict=True) if x.serve(yes)})

    def _settle(self, changed: set[int]) -> None:
        """Where these layers hold other tensors now, put them where the recorded step expects them, or record anew."""
        if changed and self._put_back(changed):
            self.drop()
            self._hold()

    # ---- memory that stays

    def _fix(self, given: dict[str, Any]) -> None:
        """Everything where the step expects it: the windows, the inputs."""
        inference = torch.is_inference_mode_enabled()
        moved = any(layer.state.window.before is None for layer in self.layers) or inference != self.inference
        if moved or not _same(self.cache.beside, self.beside) or _kinds(given) != _kinds(self.inputs):
            self.release()
            self.inference = inference
            if not inference:  # what was made under it nobody may write to
                for layer in self.layers:
                    swap(layer.state, lambda x: x.clone() if x.is_inference() else x)
            self.tries += 1
            self.beside = self.cache.beside
            self.inputs = {n: x.clone() if isinstance(x, Tensor) else x for n, x in given.items()}
            self.column = torch.full((1,), self.cache.get_seq_length(), dtype=torch.int32, device=self.device)
            for layer in self.layers:
                layer.fix(ROOM)
            self._hold()
            self.wished = _later(self._wishes())
        for name, x in given.items():
            if isinstance(x, Tensor):
                self.inputs[name].copy_(x)

    def release(self) -> None:
        """Steps run from Python again. Nothing is held, so that while windows are copied one layer's is there twice."""
        self.drop()
        self.held = []
        for layer in self.layers:
            layer.loosen()

    def _hold(self) -> None:
        """From here on every tensor stays where it is."""
        self.held = [_tensors(layer.state) for layer in self.layers]
        self.told = [outline(layer.state) for layer in self.layers]

    def _put_back(self, layers: Iterable[int]) -> str:
        """Copy what was replaced to where it was. -> why that cannot be, and then nothing is copied."""
        moved: dict[int, tuple[Tensor, Tensor]] = {}
        for i in layers:
            state = self.layers[i].state
            if outline(state) != self.told[i]:
                return f"what layer {i} holds changes its shape"
            for to, x in zip(self.held[i], _tensors(state), strict=True):
                if to is not x and moved.setdefault(id(to), (to, x))[1] is not x:
                    return f"what was one tensor in layer {i} became two"
        written = {to.untyped_storage().data_ptr() for to, _ in moved.values()}
        copies: dict[torch.dtype, tuple[list[Tensor], list[Tensor]]] = {}
        for to, x in moved.values():
            targets, sources = copies.setdefault(to.dtype, ([], []))
            targets.append(to)
            sources.append(x.clone() if x.untyped_storage().data_ptr() in written else x)
        for targets, sources in copies.values():
            torch.ops.aten._foreach_copy_(targets, sources)  # of all layers in a few launches
        for i in layers:
            places = iter(self.held[i])
            swap(self.layers[i].state, lambda _, places=places: next(places))
        return ""


def _later(flags: Tensor | None) -> Callable[[], list[bool]]:
    """Their values, once they are asked for; on the way to the host meanwhile."""
    if flags is None:
        return list
    if flags.device.type == "cpu":
        return flags.tolist
    there, event = torch.empty_like(flags, device="cpu", pin_memory=True), torch.cuda.Event()
    there.copy_(flags, non_blocking=True)
    event.record()

    def values() -> list[bool]:
        event.synchronize()
        return there.tolist()

    return values


def _kinds(given: dict[str, Any]) -> dict[str, Any]:
    """Inputs without their values. Where they lie does not matter: they are copied."""
    return {n: (x.shape, x.dtype) if isinstance(x, Tensor) else x for n, x in given.items()}


def _same(a: list[Tensor], b: list[Tensor]) -> bool:
    return len(a) == len(b) and all(map(operator.is_, a, b))


def _tensors(state: State) -> list[Tensor]:
    found: list[Tensor] = []
    swap(state, lambda x: found.append(x) or x)
    return found
