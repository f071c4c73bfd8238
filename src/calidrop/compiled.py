"""Decode steps under `torch.compile(fullgraph=True)`: the model is one graph, in which the attention of a layer, with
all that its cache does, is one operation that runs from Python. So nothing that a cache knows (lengths, positions, what
is due) is in the graph, and it is compiled once per batch size, however long the sequences get."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from calidrop import plugin
from calidrop.masks import PositionMask, within

if TYPE_CHECKING:
    from calidrop.cache import KVCache
    from calidrop.layer import LayerKV


class CompilerError(Exception):
    """A step could not be compiled; nothing of it was run."""


_library = torch.library.Library("calidrop", "DEF")
_library.define("attend(Tensor q, Tensor k, Tensor v, int layer, float scale, float? softcap, Tensor? sink) -> Tensor")
_answering: list[KVCache] = []  # the one in use: an operation takes tensors and numbers
_one = threading.Lock()  # at a time


@torch.library.impl(_library, "attend", "CompositeExplicitAutograd")
def _attend(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    kv, own = _asked(layer)
    if own:
        kv.update(k, v)
    mask = PositionMask() if kv.reach is None else within(kv.reach)
    return kv.attend(q, mask, scale, softcap, sink).transpose(1, 2).contiguous()


@torch.library.register_fake("calidrop::attend", lib=_library)
def _shape(
    q: Tensor, k: Tensor, v: Tensor, layer: int, scale: float, softcap: float | None, sink: Tensor | None
) -> Tensor:
    B, Hq, T, _ = q.shape
    return q.new_empty(B, T, Hq, _asked(layer)[0].answers(v))


def _asked(layer: int) -> tuple[LayerKV, bool]:
    """Which layer of the cache a layer of the model asks, and whether it has keys and values for it."""
    (cache,) = _answering
    own = cache.asks.get(layer, layer)
    return cache.layers[own], own == layer  # type: ignore[return-value]


def run_compiled(model: nn.Module, plain: Callable[..., Any], cache: KVCache, given: dict[str, Any]) -> Any:
    """A step of one token per row. plain: the forward of the model's class. Raises CompilerError with nothing done."""
    from torch._dynamo.exc import FailOnRecompileLimitHit, TorchDynamoException  # take a second to import

    # a mask of four dims is handed through as it is, else the model would ask the cache for its length
    none = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=given["input_ids"].device)
    with _one:
        try:
            _answering.append(cache)
            plugin.in_step = True
            return _compiled(plain)(model, attention_mask=none, **given)
        except (TorchDynamoException, FailOnRecompileLimitHit) as error:  # the second: one batch size too many
            raise CompilerError(str(error)) from error
        finally:
            plugin.in_step = False
            _answering.clear()


@functools.cache
def _compiled(plain: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(plain, fullgraph=True, dynamic=False)
