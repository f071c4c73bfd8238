"""Keys rebuilt from latents and rotated to their positions, in Triton: one pass instead of products, a copy per head
and a rotation. The oracle is `Basis.keys_of` and `Rope.rotate` in plain torch. Latents of 16 bits are multiplied with
tf32 (the basis is rounded to 11 bits), those of fp32 exactly.
"""

# pyright: basic, reportAssignmentType=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calidrop.ops.gpu._shared import INTERPRETED, launch, padded


@triton.jit(do_not_specialize=["N"])
def _keys(
    z, pos, weight, bias, order, freq, out, N, scaling, HEADS: tl.constexpr, PER: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grid (block of tokens, place in `order`, row). z [B,N,groups*RANK], weight [groups,PER*D,RANK]."""
    precision: tl.constexpr = "ieee" if INTERPRETED or z.dtype.element_ty == tl.float32 else "tf32"
    slot, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = tl.load(order + slot)
    group = slot // PER
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < N
    row = b * N + n.to(tl.int64)
    i, j, c = tl.arange(0, HP), tl.arange(0, REST), tl.arange(0, STEP)
    first = weight + (group * PER + slot % PER).to(tl.int64) * D * RANK
    a, x = tl.zeros([BLOCK, HP], tl.float32), tl.zeros([BLOCK, HP], tl.float32)
    rest = tl.zeros([BLOCK, REST], tl.float32)
    for r in range(0, RANK, STEP):
        rank = r + c
        left = tl.load(
            z + row[:, None] * (HEADS // PER * RANK) + group * RANK + rank[None, :],
            mask=there[:, None] & (rank < RANK)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        a += _part(left, first, rank, i, HALF, RANK, precision)
        x += _part(left, first + HALF * RANK, rank, i, HALF, RANK, precision)
        if D > 2 * HALF:
            rest += _part(left, first + 2 * HALF * RANK, rank, j, D - 2 * HALF, RANK, precision)
    a += tl.load(bias + head * D + i, mask=i < HALF, other=0.0)[None, :]
    x += tl.load(bias + head * D + HALF + i, mask=i < HALF, other=0.0)[None, :]
    angle = (
        tl.load(pos + row, mask=there, other=0).to(tl.float32)[:, None]
        * tl.load(freq + i, mask=i < HALF, other=0.0)[None, :]
    )
    cos, sin = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    place = out + ((b * HEADS + head) * N + n)[:, None] * D
    here = there[:, None] & (i < HALF)[None, :]
    tl.store(place + i[None, :], (a * cos - x * sin).to(out.dtype.element_ty), mask=here)
    tl.store(place + HALF + i[None, :], (x * cos + a * sin).to(out.dtype.element_ty), mask=here)
    if D > 2 * HALF:
        rest += tl.load(bias + head * D + 2 * HALF + j, mask=j < D - 2 * HALF, other=0.0)[None, :]
        here = there[:, None] & (j < D - 2 * HALF)[None, :]
        tl.store(place + 2 * HALF + j[None, :], (rest * scaling).to(out.dtype.element_ty), mask=here)


@triton.jit
def _part(left, weight, rank, i, WIDTH: tl.constexpr, RANK: tl.constexpr, PRECISION: tl.constexpr):
    """left [N,STEP] times some rows of a weight [WIDTH,RANK], transposed."""
    mask = (rank < RANK)[:, None] & (i < WIDTH)[None, :]
    w = tl.load(weight + i[None, :] * RANK + rank[:, None], mask=mask, other=0.0)
    return tl.dot(left, w, input_precision=PRECISION)


def keys(z: Tensor, pos: Tensor, weight: Tensor, bias: Tensor, order: Tensor, freq: Tensor, scaling: float) -> Tensor:
    """z [B,N,groups*rank], pos int [B,N], weight fp32 [groups,heads*D,rank], bias fp32 [H*D], order int [H] (the heads
    group by group), freq fp32 [rotated dims / 2] -> keys [B,H,N,D] in z's dtype, rotated and times `scaling`."""
    B, N, _ = z.shape
    groups, width, rank = weight.shape
    H, half = len(order), len(freq)
    D = width * groups // H
    out = torch.empty(B, H, N, D, device=z.device, dtype=z.dtype)
    launch(
        _keys, (triton.cdiv(N, 64), H, B), z.contiguous(), pos.contiguous(), weight.contiguous(), bias.contiguous(),
        order, freq, out, N, scaling, HEADS=H, PER=H // groups, RANK=rank, D=D, HALF=half, HP=padded(half),
        REST=padded(max(1, D - 2 * half)), BLOCK=64, STEP=32, num_stages=2,
    )  # fmt: skip
    return out
