"""A cache saved to a file, and back."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calidrop.layer import LayerKV, LayerState
from calidrop.masks import REAL, Told
from calidrop.parts import Layer
from calidrop.stateful import state_of
from calidrop.written import head_of, read, write

if TYPE_CHECKING:
    from calidrop.cache import KVCache


def save(cache: KVCache, file: str | os.PathLike) -> None:
    """See `KVCache.save`."""
    cache.compress()
    told, at = [], []  # what masks said is one thing for many layers
    for layer in cache.layers_here:
        same = [i for i, x in enumerate(told) if x is layer.told]
        at.append(same[0] if same else len(told))
        if not same:
            told.append(layer.told)
    parts = {
        "layers": [_loose(layer.state) for layer in cache.layers_here],
        "beside": [state_of(layer) for layer in cache.layers],
        "told": [x if x is None else list(x) for x in told],
        "samples": [x.sample for x in cache.of],
    }
    new = [LayerState(layer.make().store) for layer in cache.layers_here]
    meta = {
        "recipe": str(cache.recipe),
        "model": _facts(cache),
        "told": at,
        "column_bytes": [layer.column_bytes for layer in cache.layers_here],
    }
    write(parts, {**dict.fromkeys(parts), "layers": new}, meta, file)


def _loose(state: LayerState) -> LayerState:
    """The state as it is where no steps are recorded."""
    if state.window.before is None:
        return state
    new: Any = state.fork()
    new.window = state.window.loose()
    return new


def _facts(cache: KVCache) -> dict[str, Any]:
    """Of a model and a process: caches go where these are the same."""
    one = cache.of[0].heads
    shapes = [[x.query_heads, x.kv_heads, x.head_dim, x.value_dim, x.asking] for x in cache.of]
    return {
        "model type": cache.of[0].model_type,
        "dtype": str(cache.dtype),
        "heads per layer": shapes,
        "reach per layer": [layer.reach for layer in cache.layers_here],
        "process": [one.rank, one.size],
    }


def load(kind: type[KVCache], model: nn.Module, file: str | os.PathLike, **how: Any) -> KVCache:
    """See `KVCache.load`."""
    head = head_of(file)
    cache = kind(model, head["recipe"], **how)
    for what, here in _facts(cache).items():
        if head["model"][what] != here:
            raise ValueError(f"the cache in {str(file)!r} fits another model: {what} {head['model'][what]}, got {here}")
    devices = {x.device for x in model.parameters() if not x.is_meta}
    peers = {**dict.fromkeys(head["parts"]), "layers": [layer.state for layer in cache.layers_here]}
    parts = read(head, peers, file, devices.pop() if len(devices) == 1 else None)
    _check_weights(cache.of, parts["samples"], file)
    told = [x if x is None else REAL if x == [None] else Told(*x) for x in parts["told"]]
    each = zip(cache.layers_here, parts["layers"], head["told"], head["column_bytes"], strict=True)
    for layer, state, at, column_bytes in each:
        _fill(layer, state, told[at], column_bytes)
    for layer, state in zip(cache.layers, parts["beside"], strict=True):
        vars(layer).update(state)
        held = [x for of in state.values() for x in of.values() if isinstance(x, Tensor)]
        if held:  # as transformers notes when it makes them
            vars(layer).update(dtype=held[0].dtype, device=held[0].device)
    return cache


def _fill(layer: LayerKV, state: LayerState, told: Told | None, column_bytes: int) -> None:
    layer.state, layer.told, layer.column_bytes = state, told, column_bytes
    layer.plan, layer.is_initialized = replace(layer.plan, store=state.store), state.context is not None


def _check_weights(of: list[Layer], samples: list[Tensor | None], file: str | os.PathLike) -> None:
    """Raises ValueError for a model of the same shape with other weights, as far as a few of each layer tell."""
    for layer, was in zip(of, samples, strict=True):
        if layer.sample is None or was is None:
            continue
        if not torch.allclose(layer.sample.cpu(), was.cpu(), rtol=0.02, atol=0.02 * float(was.abs().mean())):
            raise ValueError(f"the cache in {str(file)!r} is of a model whose key weights are not this model's")
