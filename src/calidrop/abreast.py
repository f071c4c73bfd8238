"""Several caches in one batch: the model's weights, most of what a step of a small model reads, are read once for all.

Row r of cache c is row c * rows + r of the batch.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from calidrop import KVCache
from calidrop.layer import LayerKV
from calidrop.masks import PositionMask
from calidrop.plugin import Handle


class AbreastLayer(CacheLayerMixin):
    """The same layer of each cache. seconds: the CPU time each spent on attention and compression."""

    is_sliding = False
    is_compileable = False

    def __init__(self, layers: Sequence[LayerKV]):
        super().__init__()
        self.layers, self.config = layers, layers[0].config
        self.pending: tuple[Tensor, Tensor] | None = None
        self.seconds = [0.0] * len(layers)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.pending = key_states, value_states
        handle = Handle(self)
        return handle, handle

    def attend(self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None) -> Tensor:
        assert self.pending is not None
        own, n = copy.copy(mask), len(self.layers)
        own.pads = None if mask.pads is None else mask.pads[: len(q) // n]  # the same prompts for all
        own.given = 0  # each cache would compare it for itself
        out = []
        for i, (layer, *qkv) in enumerate(zip(self.layers, *(x.chunk(n) for x in (q, *self.pending)), strict=True)):
            start = time.thread_time()
            layer.update(qkv[1], qkv[2])
            out.append(layer.attend(qkv[0], own, scale, softcap, sink))
            self.seconds[i] += time.thread_time() - start
        self.pending = None
        return torch.cat(out)

    def get_seq_length(self, *args: Any) -> int:
        return self.layers[0].get_seq_length()

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.layers[0].get_mask_sizes(query_length)

    def get_max_length(self) -> int:
        return -1

    get_max_cache_shape = get_max_length


class Abreast(Cache):
    """The caches must be of one model, and get the same padding."""

    def __init__(self, caches: Sequence[KVCache]):
        super().__init__(layers=[AbreastLayer(layers) for layers in zip(*(c.layers for c in caches), strict=True)])

    def seconds(self) -> list[float]:
        """CPU time each cache spent since the last call, all layers."""
        layers: list[AbreastLayer] = self.layers  # type: ignore[assignment]
        spent = [sum(x, 0.0) for x in zip(*(layer.seconds for layer in layers), strict=True)]
        for layer in layers:
            layer.seconds = [0.0] * len(spent)
        return spent
