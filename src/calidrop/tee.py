"""One forward pass over a prompt for many recipes.

What a recipe holds after a prompt depends on the prompt's queries, keys, values and their log-sum-exp alone, since a
prompt is attended exactly before it is compressed. So the exact answer is computed once per layer and told to every
cache; each compresses on the spot. The peak is all compressed caches and one layer's full cache.
"""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from calidrop import ops
from calidrop.attention import with_sink
from calidrop.cache import KVCache
from calidrop.compare import now
from calidrop.layer import LayerKV
from calidrop.masks import REAL, PositionMask
from calidrop.plugin import Handle, asked, using
from calidrop.support import check_plain


@dataclass(frozen=True)
class Prefilled:
    """logits: after the last token, [B,vocabulary], the same for all. seconds: per cache, what the prompt would have
    taken it alone: the shared pass, and its `own` compression."""

    logits: Tensor
    seconds: list[float]
    own: list[float]


@torch.no_grad()
def prefill(
    model: Any, caches: Sequence[KVCache], input_ids: Tensor, attention_mask: Tensor | None = None
) -> Prefilled:
    """Run a prompt [B,T] once and fill every cache with it, as `model(input_ids, **using(KVCache(..., eager=True)))`
    would fill each. Raises ValueError for caches that are not empty, are of another model, or of a recipe that changes
    how the prompt is run (`Recipe.alone`)."""
    if not caches:
        raise ValueError("no caches to fill")
    check_plain(model, "a prefill for several caches")
    for cache in caches:
        if cache.config() is not caches[0].config():
            raise ValueError("these caches were built for different models")
        if cache.recipe.alone:
            raise ValueError(f"{cache.recipe} runs the prompt in its own way: it cannot share a prefill")
        if cache.get_seq_length():
            raise ValueError(f"the cache of {cache.recipe} is not empty: it holds {cache.get_seq_length()} tokens")
    tee = _Tee(caches)
    start = now(input_ids)
    out = model(input_ids, attention_mask=attention_mask, **using(tee), use_cache=True, logits_to_keep=1)
    total = now(input_ids) - start
    layers: list[_TeeLayer] = tee.layers  # type: ignore[assignment]
    own = [sum(layer.seconds[i] for layer in layers) for i in range(len(caches))]
    return Prefilled(out.logits[:, -1], [total - sum(own) + mine for mine in own], own)


class _Tee(Cache):
    def __init__(self, caches: Sequence[KVCache]):
        super().__init__(layers=[_TeeLayer(list(layers)) for layers in zip(*(c.layers for c in caches), strict=True)])


class _TeeLayer(CacheLayerMixin):
    """Attends one layer's prompt and keeps nothing."""

    is_sliding = False
    is_compileable = False

    def __init__(self, layers: list[LayerKV]):
        super().__init__()
        self.layers, self.reach = layers, layers[0].reach
        self.config: weakref.ref | None = layers[0].config
        self.pending: tuple[Tensor, Tensor] | None = None
        self.seconds = [0.0] * len(layers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.pending = (key_states, value_states)
        handle = Handle(self)
        return handle, handle

    def get_seq_length(self, *args: Any) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return int(query_length), 0

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length

    def attend(self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        assert self.pending is not None
        (k, v), self.pending = self.pending, None
        qs, new = asked(q, k, v, mask, 0, scale, softcap)
        mass = None
        if sink is None and any(layer.sums for layer in self.layers):
            found, mass = ops.prompt_with_mass(qs, new)
        else:
            found = ops.prompt(qs, new, self.reach)
        o, lse = with_sink(qs, found, sink)
        told = mask.agreed(REAL, 0, k.shape[2])
        for i, layer in enumerate(self.layers):
            start = now(q)
            layer.learn(qs, new, lse, mass, told)
            self.seconds[i] = now(q) - start
        return o
