"""How many bytes a recipe will hold, found by running it: random tokens of one kv head go through every distinct layer.

Nothing is computed from a formula, so positions, scales, windows, idle buffer slots and observed queries are in it.
What is not run is attention over the prompt: bytes do not depend on it, and it is all that is slow.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from calidrop.attention import Queries
from calidrop.layer import LayerKV, LayerState
from calidrop.memory import available, megabytes
from calidrop.observe import Observation
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer, Plan, Shrink
from calidrop.recipe import Recipe
from calidrop.rope import Rope
from calidrop.state import Host, Ragged, Shared, State, held_bytes, tensors
from calidrop.tokens import Tokens
from calidrop.window import Window

Layers = Sequence[tuple[Layer, int | None]]
"""Per layer: what a method is told, and how far back it sees where that is bounded (`cache.layers_of`)."""

RULER = 2048  # tokens of the two runs that tell what is held per row from what is held per head


@dataclass(frozen=True)
class Footprint:
    """What a process holds after a prompt: device and host, bytes. tokens: how many a kv head answers from on the
    device, mean over the layers that see everything. bits: of the coarsest codes any of them is stored in, per channel
    of the model, without scales."""

    device: int
    host: int
    tokens: float
    bits: float


@dataclass(frozen=True)
class _Run:
    device: int
    host: int
    tokens: float  # per head
    bits: float
    shared: dict[int, int]  # storage -> bytes that are there once, whatever the number of layers and rows


@dataclass(frozen=True)
class _Kind:
    """Layers that are alike: how their plan is made, how far back they see, and how many layers ask them."""

    make: Callable[[], Plan]
    reach: int | None
    asking: int


class Prompt:
    """Random tokens of one kv head, shared by all runs: k [1,1,N,D], v [1,1,N,Dv]; `group` query heads."""

    def __init__(self, layer: Layer, context: int, dtype: torch.dtype):
        needs = 24 * context * (layer.head_dim + layer.value_dim)  # in fp32, as drawn, in two windows and stored
        free, _ = available()
        if needs > max(free, 1 << 30):
            raise ValueError(
                f"a plan runs recipes on one kv head, which for {context:,} tokens takes about {megabytes(needs)} of "
                f"host memory, got {megabytes(free)}: plan for fewer tokens"
            )
        self.draw = torch.Generator().manual_seed(0)
        self.group = layer.query_heads // layer.kv_heads
        self.k, self.v = (self._random(1, context, d).to(dtype) for d in (layer.head_dim, layer.value_dim))

    def _random(self, *shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=self.draw, dtype=torch.float32)

    def queries(self, n: int, context: int, heads: int) -> Queries:
        """The last n of the context; every kv head of `heads` has the same."""
        q = self._random(self.group, n, self.k.shape[-1]).to(self.k.dtype).repeat(1, heads, 1, 1)
        pos = torch.arange(context - n, context, dtype=torch.int32)[None]
        return Queries(q, pos, self.k.shape[-1] ** -0.5, prompt=True)

    def run(self, plan: Plan, reach: int | None, context: int, heads: int, asking: int = 1) -> LayerState:
        """The state of a layer of `heads` equal heads that `asking` layers ask after a prompt of `context` tokens, as
        `LayerKV.attend` leaves it. Equal, so that budgets shared by heads are split evenly."""
        kv = LayerKV(lambda: plan, reach)
        s = kv.state
        k, v = (x[:, :, :context].expand(-1, heads, -1, -1) for x in (self.k, self.v))
        pos = torch.arange(context, dtype=torch.int32).expand(1, heads, context)
        s.context, s.start, s.seen = torch.tensor([context]), torch.tensor([0]), context
        s.window.append(Tokens(k, v, pos, dense=True))
        if reach is not None and context > reach:
            s.window = s.window.tail(reach)
        if s.store is not None:
            qs = self.queries(min(plan.observe, context), context, heads)
            lse = torch.full(qs.q.shape[:3], math.log(context), dtype=torch.float32)
            step = Observation(qs, lse, s.context, s.start, beside=[qs.alone() for _ in range(asking - 1)])
            s.store.observe(step)
            for score in s.store.trackers():
                s.window.stats = {**s.window.stats, **score.stats(s.window.tokens(), step)}
            if plan.soft is not None:
                soft = self.queries(len(plan.soft), context, heads)
                step = dataclasses.replace(
                    step,
                    soft=Observation(soft, torch.full(soft.q.shape[:3], 0.0, dtype=torch.float32), s.context, s.start),
                )
            s.due = plan.prompts
            if kv.keeps_queries:
                s.obs = step
            kv.settle()
        return s


def footprint(recipe: Recipe, layers: Layers, prompt: Prompt, context: int, batch: int) -> Footprint:
    """What `recipe` holds after `batch` prompts of `context` tokens without padding.

    Exact where the number of tokens of a format depends on the budget alone. Heads of a layer are taken to be alike, so
    budgets that heads share (adakv) are at their mean, and so is what does not fill a group; pools that depend on the
    values of keys (ott) are those of random keys. Raises ValueError where the recipe does not fit the model."""
    shrink = recipe.part(Shrink)
    joint, heads = shrink is not None and shrink.joint, layers[0][0].kv_heads // layers[0][0].heads.size
    kinds: dict[Any, tuple[_Kind, int]] = {}
    alive = []  # until all are told apart by identity
    alone = _alone(layers, joint)
    for layer, reach in alone:
        make = _maker(recipe, layer, reach)
        alive.append(make())
        key = ("bounded", reach) if reach is not None else (layer.asking, _signature(alive[-1]))
        kinds[key] = _Kind(make, reach, layer.asking), kinds[key][1] + 1 if key in kinds else 1
    runs = [(_layer(prompt, kind, context, heads, joint), kind.reach, n) for kind, n in kinds.values()]
    whole = [(run, n) for run, reach, n in runs if reach is None] or [(run, n) for run, _, n in runs]
    shared = {storage: n for run, _, _ in runs for storage, n in run.shared.items()}
    return Footprint(
        batch * sum(n * run.device for run, _, n in runs) + sum(shared.values()),
        batch * sum(n * run.host for run, _, n in runs),
        sum(n * run.tokens for run, n in whole) / sum(n for _, n in whole),
        min(run.bits for run, _ in whole),
    )


def _alone(layers: Layers, joint: bool) -> Layers:
    """What a method is told where one kv head is run by itself, on the CPU. joint: all heads are run."""
    changes: dict[str, Any] = {"heads": HeadGroup()}
    if not joint:
        changes |= {"query_heads": layers[0][0].query_heads // layers[0][0].kv_heads, "kv_heads": 1}
    ropes: dict[Rope | None, Rope | None] = {None: None}
    for rope in {layer.rope for layer, _ in layers if layer.rope is not None}:
        freq = rope.inv_freq
        if joint and freq.is_meta:
            raise ValueError(
                "a recipe that was trained for a model can be planned for that model only, not for a config"
            )
        # without weights frequencies have no values; any will do
        ropes[rope] = Rope(0.1 ** torch.arange(len(freq)) if freq.is_meta else freq.cpu(), rope.interleaved)
    return [(dataclasses.replace(layer, rope=ropes[layer.rope], **changes), reach) for layer, reach in layers]


def _layer(prompt: Prompt, kind: _Kind, context: int, heads: int, joint: bool) -> _Run:
    """A whole layer of one row, from runs of one and of two heads, or (joint) of all."""
    if joint:
        return _measure(prompt, kind, context, heads)
    one = _measure(prompt, kind, context, 1)
    short = min(context, RULER)
    single = one if short == context else _measure(prompt, kind, short, 1)
    row = 2 * single.device - _measure(prompt, kind, short, 2).device  # held once for all heads
    return replace(one, device=row + heads * (one.device - row), host=heads * one.host)


def _maker(recipe: Recipe, layer: Layer, reach: int | None) -> Callable[[], Plan]:
    if reach is not None:
        return lambda: Plan(None, 0, None, 1)
    return lambda: recipe.plan(layer)


def _measure(prompt: Prompt, kind: _Kind, context: int, heads: int) -> _Run:
    state = prompt.run(kind.make(), kind.reach, context, heads, kind.asking)
    formats = list(_formats(state, heads, prompt.k.shape[-1] + prompt.v.shape[-1], set()))
    shared = {t.data_ptr(): t.nbytes for x in _shared(state) for t in tensors(x)}
    return _Run(
        held_bytes(state) - sum(shared.values()),
        held_bytes(state, host=True),
        sum(n for n, _ in formats) / heads,
        min((bits for _, bits in formats), default=math.inf),
        shared,
    )


def _shared(value: Any) -> Iterator[Shared]:
    if isinstance(value, Shared):
        yield value
    elif isinstance(value, State):
        yield from (found for item in vars(value).values() for found in _shared(item))


def _formats(value: Any, heads: int, width: int, seen: set[int]) -> Iterator[tuple[int, float]]:
    """(tokens, bits per channel) of everything on the device that holds tokens, of all heads. width: channels of a key
    and value. seen: what was visited, as an object may be reached in two ways."""
    if isinstance(value, list):
        for item in value:
            yield from _formats(item, heads, width, seen)
    if not isinstance(value, State) or isinstance(value, Host) or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, Window) and len(value):
        yield value.pos.value.numel(), 8.0 * value.tokens().k.element_size()
    elif isinstance(value, Ragged):
        n = int((value.data["pos"] >= 0).sum()) if "pos" in value.data else 0
        n *= heads // value.lens.shape[1]  # all heads may be stored as one
        if n:
            yield n, 8.0 * sum(x.nbytes for name, x in value.data.items() if _is_code(name)) / (n * width)
    else:
        for item in vars(value).values():
            yield from _formats(item, heads, width, seen)


def _is_code(column: str) -> bool:
    return column != "pos" and not column.startswith("stat:") and not column.endswith(("_scale", "_zero"))


def _signature(value: Any) -> Any:
    """Equal for two plans that do the same: by type and content, functions by code and what they close over."""
    if isinstance(value, State) or dataclasses.is_dataclass(value):
        return type(value), tuple((name, _signature(item)) for name, item in sorted(vars(value).items()))
    if isinstance(value, dict):
        return "dict", tuple((name, _signature(item)) for name, item in sorted(value.items()))
    if isinstance(value, list | tuple):
        return "list", tuple(_signature(item) for item in value)
    if callable(value) and hasattr(value, "__code__"):
        cells = tuple(_signature(cell.cell_contents) for cell in value.__closure__ or ())
        return value.__code__, _signature(value.__defaults__), cells
    return id(value) if isinstance(value, Tensor) or not isinstance(value, Hashable) else value
