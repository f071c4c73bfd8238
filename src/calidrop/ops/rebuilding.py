"""What `recalkv` asks of the kernel for CPUs: attention over latents, without keys in memory. The oracle is
`recalkv.Latents` in torch."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from calidrop.attention import Partial, Queries
from calidrop.ops import cpu
from calidrop.ops.described import DTYPES, describe
from calidrop.ops.piece import Piece

if TYPE_CHECKING:
    from calidrop.methods._latents import Basis

_BASES = struct.Struct("@7Q5i")  # Bases of latents.cpp


def refusal(qs: Queries) -> str:
    """Why `attend` cannot answer these queries; "" where it can."""
    if qs.q.device.type != "cpu" or qs.q.requires_grad:
        return "it is for CPUs and knows no gradients"
    wide = qs.q.shape[-1] > cpu.HEAD_DIMS[-1]
    return f"{qs.q.shape[-1]} channels, it takes {cpu.HEAD_DIMS[-1]}" if wide else cpu.refusal(qs)


def reads(x: Piece) -> bool:
    """Whether `attend` can read latents that are stored so."""
    if x.kind == "exact":
        return x.columns["k"].dtype in DTYPES
    return x.kind in ("per token", "per channel", "e4m3") and x.q is None and x.mix is None


def attend(qs: Queries, pieces: Sequence[Piece], basis: Basis, start: Tensor, freq: Tensor, scaling: float) -> Partial:
    """What pieces of latents [B,1,slots,r] with positions say, which `refusal` and `reads` allow. start: int64 [B], the
    column of position 0; freq: fp32 [half]. -> o [B,Hq,T,Dv], lse [B,Hq,T], fp32."""
    B, Hq, T, D = qs.q.shape
    q, Dv = cpu.read(qs.q), basis.values.shape[0] // basis.heads
    out, lse = cpu.blank(B, Hq, T, Dv), cpu.blank(B, Hq, T)
    like = q.new_empty(B, 1, T, basis.key_rank)  # as wide as the rows of pieces
    keep: list[Tensor] = []
    told = [describe(x, like, keep, None) for x in pieces]
    start, freq = start.contiguous(), freq.contiguous()
    laid, bias, values, value_bias = basis.for_cpu
    bases = _BASES.pack(
        *(x.data_ptr() for x in (laid, bias, freq, values, value_bias, start, basis.at)),
        basis.keys.shape[0], basis.keys.shape[2], len(freq), D, Dv,
    )  # fmt: skip
    call = cpu.asked(q, basis.heads, qs.scale * scaling, qs.softcap, told, out, lse, width=basis.value_rank)
    cpu.kernel().latents(call, bases)
    return out, lse
