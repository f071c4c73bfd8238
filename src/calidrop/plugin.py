"""The seam to transformers: one attention function and one mask function (`masks.py`), registered under one name."""

from __future__ import annotations

import inspect
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, GenerationMixin
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from calidrop import attention as oracle
from calidrop.masks import PositionMask, as_given, mask
from calidrop.tokens import Tokens

ATTENTION = "calidrop"
_TAKES = inspect.signature(vars(GenerationMixin)["prepare_inputs_for_generation"]).parameters
in_step = False  # while a compiled step runs
CACHE = "cache" if "cache" in _TAKES else "past_key_values"  # its name before transformers 5.24


class Attending(Protocol):
    """A layer of a cache that answers the model's queries itself."""

    config: weakref.ref | None
    pending: tuple[Tensor, Tensor] | None

    def get_seq_length(self) -> int: ...

    def attend(
        self, q: Tensor, mask: PositionMask, scale: float, softcap: float | None, sink: Tensor | None
    ) -> Tensor: ...


class Handle:
    """What such a layer's `update` returns in place of keys and values."""

    def __init__(self, layer: Attending):
        self.layer = layer

    def to(self, *args: Any, **kwargs: Any) -> Handle:
        """accelerate moves what layers share to the device of each; what is stored stays where it is."""
        return self

    def __getattr__(self, name: str) -> Any:
        # whatever another attention implementation asks of its keys first
        raise RuntimeError(
            f"a calidrop KVCache needs the attention implementation {ATTENTION!r}, but the model runs another one; "
            f"call model.set_attn_implementation({ATTENTION!r}) (building a KVCache for the model does)"
        )


def compiling() -> bool:
    """Whether a step is being compiled, in which keys and values go on as they are to `compiled._attend`."""
    return in_step and torch.compiler.is_compiling()


def using(cache: Any) -> dict[str, Any]:
    """The keyword argument by which this version of transformers takes a cache: `model(ids, **using(cache))`."""
    return {CACHE: cache}


def asked(
    q: Tensor, k: Tensor, v: Tensor, mask: PositionMask, seen: int, scale: float, softcap: float | None
) -> tuple[oracle.Queries, Tokens]:
    """What one call of the attention function brings, behind `seen` columns. q: [B,Hq,T,D], k and v: [B,H,T,D]."""
    B, H, T, _ = k.shape
    pos, of_heads = mask.positions(B, H, seen, T, k.device)
    new = Tokens(k, v, of_heads, dense=not mask.new_pads)
    return oracle.Queries(q, pos, scale, softcap, mask.visible, mask.window), new


def at_column(
    q: Tensor, k: Tensor, v: Tensor, column: Tensor, mask: PositionMask, scale: float, softcap: float | None
) -> tuple[oracle.Queries, Tokens]:
    """The same of one generated token, whose column (int32 [1]) only the device knows."""
    B, H = k.shape[:2]
    pos = column.expand(B, 1)
    return oracle.Queries(q, pos, scale, softcap, mask.visible), Tokens(k, v, column.expand(B, H, 1), dense=True)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Any,
    value: Any,
    attention_mask: Any,
    dropout: float = 0.0,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """The attention function: [B,Hq,T,D] -> [B,T,Hq,Dv]."""
    if compiling():
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        return torch.ops.calidrop.attend(query, key, value, module.layer_idx, scale, softcap, s_aux), None
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not isinstance(key, Handle):
        return _plain(module, query, key, value, attention_mask, dropout, scale, softcap, s_aux, kwargs)
    layer = key.layer
    owner = layer.config() if layer.config is not None else None
    mine = getattr(module, "config", owner)
    if owner is not mine:
        layer.pending = None
        raise ValueError(
            f"this cache was built for another model ({getattr(owner, 'model_type', 'gone')}), "
            f"got {type(module).__name__} of a {getattr(mine, 'model_type', '?')}: build one KVCache per model"
        )
    if not isinstance(attention_mask, PositionMask):
        columns = None if layer.pending is None else layer.get_seq_length() + query.shape[2]
        attention_mask = as_given(module, query, attention_mask, columns)
    if torch.is_autocast_enabled(query.device.type):  # rotated keys came in fp32, values did not
        dtype = torch.get_autocast_dtype(query.device.type)
        query = query.to(dtype)
        layer.pending = layer.pending and (layer.pending[0].to(dtype), layer.pending[1].to(dtype))
    # what a layer asks that is not the first prompt, or is another layer's
    if torch.is_grad_enabled() and (layer.pending is None or layer.get_seq_length()):
        learns = [x for x in (query, *(layer.pending or ())) if x.requires_grad]
        with torch.no_grad():
            o = layer.attend(query, attention_mask, scale, softcap, s_aux)
        o = _Untaught.apply(o, *learns) if learns else o
    else:
        o = layer.attend(query, attention_mask, scale, softcap, s_aux)
    return o.transpose(1, 2).contiguous(), None


class _Untaught(torch.autograd.Function):
    """An answer whose gradients nobody knows: what a cache holds, it holds without, and kernels find none."""

    @staticmethod
    def forward(ctx: Any, o: Tensor, *asked: Tensor) -> Tensor:
        return o

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            "no gradients go through the tokens of a calidrop KVCache: call the model without a cache (or with a "
            "DynamicCache) to train, and under torch.no_grad() to infer"
        )


def _plain(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: PositionMask | Tensor | None,
    dropout: float,
    scale: float,
    softcap: float | None,
    s_aux: Tensor | None,
    kwargs: dict,
) -> tuple[Tensor, None]:
    """Another cache, or none: what sdpa would have done, and softcap and sinks where sdpa cannot."""
    T = query.shape[2]
    N = key.shape[2]
    if not isinstance(mask, PositionMask):
        if softcap is None and s_aux is None:
            return sdpa_attention_forward(module, query, key, value, mask, dropout=dropout, scaling=scale, **kwargs)
        if mask is None and 1 < T < N:  # what sdpa makes of the first tokens in a static cache
            N, key, value = T, key[:, :, :T], value[:, :, :T]
        mask = as_given(module, query, mask, N)
    trivial = mask.visible is None and mask.pads is None and (T == 1 or T == N)
    if softcap is None and s_aux is None:
        q_pos, pos = mask.columns(query, 1, N)
        dense = None if trivial else oracle.visible(oracle.Queries(query, q_pos, scale, None, mask.visible), pos)
        return sdpa_attention_forward(module, query, key, value, dense, dropout=dropout, scaling=scale, **kwargs)
    q_pos, pos = mask.columns(query, key.shape[1], N)
    qs = oracle.Queries(query, q_pos, scale, softcap, mask.visible)
    o, _ = oracle.with_sink(qs, oracle.attend(qs, key, value, pos), s_aux)
    return o.transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attend)
AttentionMaskInterface.register(ATTENTION, mask)  # type: ignore[arg-type]
