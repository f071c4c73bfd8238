"""Decode steps that do not run from Python operation by operation: compiled, recorded on a GPU, or both.

A model's `forward` is wrapped once; a pass that is one generated token per row and asks for nothing else goes to the
`Steps` of the cache it was given, every other pass, and every other cache, to the model as ever.
"""

from __future__ import annotations

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calidrop.compiled import CompilerError, run_compiled
from calidrop.plugin import CACHE, using
from calidrop.steady import RECORDERS, OfCache, Steady
from calidrop.support import check_model, in_chunks

if TYPE_CHECKING:
    from calidrop.cache import KVCache

PLACES = {"attention_mask", "position_ids", "cache_position"}
TAKEN = PLACES | {CACHE, "past_key_values", "input_ids", "use_cache"}
SAME = {"logits_to_keep": (0, 1), "return_dict": (True,)}  # values that change nothing


class Steps(OfCache):
    """The steps of one cache. Raises ValueError where the model can never have such."""

    def __init__(self, cache: KVCache, model: nn.Module, graph: bool, compile: bool):
        super().__init__(cache)
        self.compile, self.why = compile, ""
        asked = " and ".join(n for n, x in (("graph=True", graph), ("compile=True", compile)) if x)
        devices = sorted({str(x.device) for x in model.parameters()})
        device = torch.device(devices[0])
        if graph and (len(devices) > 1 or device.type not in RECORDERS):
            raise ValueError(
                f"graph=True needs a model on one {' or '.join(RECORDERS)} device, got {', '.join(devices)}"
            )
        if compile and len(devices) > 1:
            raise ValueError(f"compile=True needs a model on one device, got {', '.join(devices)}")
        if compile and in_chunks(check_model(model)):
            raise ValueError(
                "compile=True needs a model whose layers see all or a sliding window; here some see chunks"
            )
        self.steady = Steady(cache, device) if graph else None
        self._install(model, asked)

    def __deepcopy__(self, memo: dict) -> Steps:
        """Those of a copy of the cache, for whose memory nothing is recorded yet."""
        new = copy.copy(self)
        OfCache.__init__(new, memo[id(self.cache)])
        new.steady = self.steady and Steady(new.cache, self.steady.device)
        return new

    def takes(self, kwargs: dict[str, Any]) -> bool:
        """Whether a forward pass is one generated token per row and asks for nothing else."""
        ids, mask = kwargs.get("input_ids"), kwargs.get("attention_mask")
        layers = self.cache.layers_here
        return (
            all(n in TAKEN or x is None or _same(n, x) for n, x in kwargs.items())
            and isinstance(ids, Tensor)
            and ids.shape[1] == 1
            and (mask is None or mask.dim() == 2)
            and not torch.is_grad_enabled()
            and all(x.state.context is not None and len(x.state.context) == len(ids) for x in layers)
            and all(x.state.seen and not x.record_past and not x.undo for x in layers)
        )

    def __call__(self, model: nn.Module, plain: Callable[..., Any], kwargs: dict[str, Any]) -> Any:
        """One step. plain: the forward of the model's class. Pads are in the cache as empty slots, so the mask says
        nothing more."""
        ids, positions = kwargs["input_ids"], kwargs.get("position_ids")
        if positions is None:
            positions = torch.full_like(ids, self.cache.get_seq_length())
        given = {"input_ids": ids, "position_ids": positions}  # always the same, or it would be compiled again
        self.cache.compress()
        steady = self.steady if self.steady is not None and self.steady.ready() else None
        if steady is None:
            self.release()
        run = functools.partial(self._run, model, plain)
        return run(**given) if steady is None else steady(run, given)

    def _run(self, model: nn.Module, plain: Callable[..., Any], **given: Any) -> Any:
        given |= {**using(self.cache), "use_cache": True, "return_dict": True}
        if self.compile:
            try:
                return run_compiled(model, plain, self.cache, given)
            except CompilerError as error:  # before anything ran
                self.compile, self.why = False, f"not compiled: {' '.join(str(error).split())[:200]}"
        return plain(model, **given)

    def release(self) -> None:
        """What comes next is not recorded."""
        if self.steady is not None:
            self.steady.release()

    def describe(self) -> str:
        told = [self.steady.describe()] if self.steady is not None else []
        told += ["compiled"] if self.compile else []
        return "steps: " + ", ".join([*told, self.why] if self.why else told)

    def _install(self, model: nn.Module, asked: str) -> None:
        """A method rather than a closure over the model: a copy of the model gets one of its own."""
        own = _stepping(type(model))
        if "forward" not in vars(model):
            model.forward = types.MethodType(own, model)
        elif getattr(model.forward, "__func__", None) is not own:
            raise ValueError(
                f"{asked}: something replaced {type(model).__name__}.forward (accelerate's device_map does)"
            )


def _same(name: str, value: Any) -> bool:
    """Whether an argument asks for what is done anyway."""
    return not isinstance(value, Tensor) and value in SAME.get(name, (False,))


@functools.cache
def _stepping(kind: type[nn.Module]) -> Callable[..., Any]:
    """The forward of a class of models that leaves steps to those of the cache, where it has some."""
    plain = kind.forward
    names = [*inspect.signature(plain).parameters][1:]

    @functools.wraps(plain)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args, strict=False)) | kwargs
        steps = getattr(named.get(CACHE, named.get("past_key_values")), "steps", None)
        if steps is None:
            return plain(self, *args, **kwargs)
        if steps.takes(named):
            return steps(self, plain, named)
        steps.release()
        return plain(self, *args, **kwargs)

    return forward
