"""Keys rebuilt from latents and rotated to their positions, in Triton: `keys` puts them into memory, `attend` asks them
where they are made, so that only latents are read. The oracle is `Basis.keys_of` and `Rope.rotate` in plain torch, and
`attention.attend` on what they give. Latents of 16 bits are multiplied with tf32 (the basis is rounded to 11 bits),
those of fp32 exactly.
"""

# pyright: basic, reportAssignmentType=false, reportArgumentType=false
from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from calidrop.attention import Partial, Queries
from calidrop.ops.gpu._shared import INTERPRETED, launch, padded, product
from calidrop.ops.gpu._split import _weigh
from calidrop.ops.gpu.attention import LEAST, _warps, joined


@triton.jit
def _rebuilt(
    z, at, weight, bias, freq, n, there, slot, head, scaling, HEADS: tl.constexpr, PER: tl.constexpr,
    RANK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, REST: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """Rotated keys of tokens n of a row, fp32: both halves of the rotated channels [BLOCK,HP], and the rest
    [BLOCK,REST]. z: the row's latents. at: fp32 [BLOCK], positions. slot: of the head in the order of the groups."""
    precision: tl.constexpr = "ieee" if INTERPRETED or z.dtype.element_ty == tl.float32 else "tf32"
    group = slot // PER
    i, j, c = tl.arange(0, HP), tl.arange(0, REST), tl.arange(0, STEP)
    first = weight + (group * PER + slot % PER).to(tl.int64) * D * RANK
    a, x = tl.zeros([n.shape[0], HP], tl.float32), tl.zeros([n.shape[0], HP], tl.float32)
    rest = tl.zeros([n.shape[0], REST], tl.float32)
    for r in range(0, RANK, STEP):
        rank = r + c
        left = tl.load(
            z + n.to(tl.int64)[:, None] * (HEADS // PER * RANK) + group * RANK + rank[None, :],
            mask=there[:, None] & (rank < RANK)[None, :], other=0.0,
        ).to(tl.float32)  # fmt: skip
        a += _part(left, first, rank, i, HALF, RANK, precision)
        x += _part(left, first + HALF * RANK, rank, i, HALF, RANK, precision)
        if D > 2 * HALF:
            rest += _part(left, first + 2 * HALF * RANK, rank, j, D - 2 * HALF, RANK, precision)
    a += tl.load(bias + head * D + i, mask=i < HALF, other=0.0)[None, :]
    x += tl.load(bias + head * D + HALF + i, mask=i < HALF, other=0.0)[None, :]
    if D > 2 * HALF:
        rest += tl.load(bias + head * D + 2 * HALF + j, mask=j < D - 2 * HALF, other=0.0)[None, :]
    angle = at[:, None] * tl.load(freq + i, mask=i < HALF, other=0.0)[None, :]
    cos, sin = tl.cos(angle) * scaling, tl.sin(angle) * scaling
    return a * cos - x * sin, x * cos + a * sin, rest * scaling


@triton.jit(do_not_specialize=["N"])
def _keys(
    z, pos, weight, bias, order, freq, out, N, scaling, HEADS: tl.constexpr, PER: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, REST: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grid (block of tokens, place in `order`, row). z [B,N,groups*RANK], weight [groups,PER*D,RANK]."""
    slot, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    head = tl.load(order + slot)
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    there = n < N
    at = tl.load(pos + b * N + n, mask=there, other=0).to(tl.float32)
    first, second, rest = _rebuilt(
        z + b * N * (HEADS // PER * RANK), at, weight, bias, freq, n, there, slot, head, scaling,
        HEADS, PER, RANK, D, HALF, HP, REST, STEP,
    )  # fmt: skip
    i, j = tl.arange(0, HP), tl.arange(0, REST)
    place = out + ((b * HEADS + head) * N + n)[:, None] * D
    here = there[:, None] & (i < HALF)[None, :]
    tl.store(place + i[None, :], first.to(out.dtype.element_ty), mask=here)
    tl.store(place + HALF + i[None, :], second.to(out.dtype.element_ty), mask=here)
    if D > 2 * HALF:
        here = there[:, None] & (j < D - 2 * HALF)[None, :]
        tl.store(place + 2 * HALF + j[None, :], rest.to(out.dtype.element_ty), mask=here)


@triton.jit(do_not_specialize=["N", "splits", "per", "z_row", "v_row", "pos_row"])
def _asked(
    q, z, v, pos, start, weight, bias, slots, freq, o, lse, N, splits, per, z_row, v_row, pos_row,
    scale, softcap, scaling, CAPPED: tl.constexpr, HEADS: tl.constexpr, PER: tl.constexpr, RANK: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, HP: tl.constexpr, REST: tl.constexpr, R: tl.constexpr, RP: tl.constexpr,
    DV: tl.constexpr, DVP: tl.constexpr, BLOCK: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head, split). What tokens split * per ... say: keys live only here, values are the latents of
    all heads."""
    bh, part = tl.program_id(0), tl.program_id(1)
    b, head = (bh // HEADS).to(tl.int64), bh % HEADS
    slot = tl.load(slots + head)
    dt: tl.constexpr = q.dtype.element_ty if q.dtype.element_ty == z.dtype.element_ty else tl.float32
    r, i, j, dv = tl.arange(0, RP), tl.arange(0, HP), tl.arange(0, REST), tl.arange(0, DVP)
    rows = (q + (bh.to(tl.int64) * R + r) * D)[:, None]
    asks = (r < R)[:, None] & (i < HALF)[None, :]
    q1 = tl.load(rows + i[None, :], mask=asks, other=0.0).to(dt)
    q2 = tl.load(rows + HALF + i[None, :], mask=asks, other=0.0).to(dt)
    q3 = tl.load(rows + 2 * HALF + j[None, :], mask=(r < R)[:, None] & (j < D - 2 * HALF)[None, :], other=0.0).to(dt)
    pads = tl.load(start + b).to(tl.int32)
    m = tl.full([RP], float("-inf"), tl.float32)
    l, acc = tl.zeros([RP], tl.float32), tl.zeros([RP, DVP], tl.float32)
    stop = tl.minimum(part * per + per, N)
    for t in range(part * per, stop, BLOCK):
        n = t + tl.arange(0, BLOCK)
        column = tl.load(pos + b * pos_row + n, mask=n < stop, other=-1)
        there = column >= 0
        k1, k2, k3 = _rebuilt(
            z + b * z_row, (column - pads).to(tl.float32), weight, bias, freq, n, there, slot, head, scaling,
            HEADS, PER, RANK, D, HALF, HP, REST, STEP,
        )  # fmt: skip
        s = product(q1, tl.trans(k1.to(dt)))
        s = product(q2, tl.trans(k2.to(dt)), s)
        if D > 2 * HALF:
            s = product(q3, tl.trans(k3.to(dt)), s)
        s *= scale
        if CAPPED:
            s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
        w, shrink, m, l = _weigh(tl.where(there[None, :], s, float("-inf")), m, l)
        place = v + b * v_row + n.to(tl.int64)[:, None] * DV + dv[None, :]
        y = tl.load(place, mask=there[:, None] & (dv < DV)[None, :], other=0.0)
        acc = acc * shrink[:, None] + product(w.to(dt), y.to(dt))
    empty = l == 0.0
    l = tl.where(empty, 1.0, l)
    place = (bh.to(tl.int64) * splits + part) * R + r
    tl.store(lse + place, tl.where(empty, float("-inf"), m + tl.log(l)), mask=r < R)
    tl.store(o + place[:, None] * DV + dv[None, :], acc / l[:, None], mask=(r < R)[:, None] & (dv < DV)[None, :])


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


def attend(
    qs: Queries, z: Tensor, v: Tensor, pos: Tensor, start: Tensor, weight: Tensor, bias: Tensor, slots: Tensor,
    freq: Tensor, scaling: float, least: int = LEAST,
) -> Partial:  # fmt: skip
    """A few queries over all tokens of a cache of latents: z and v [B,N,...], the keys' and the values' of all heads,
    pos int [B,N] columns, -1 where there is none, start [B] the column of position 0. slots int [H]: where each head is
    in the groups. The others as in `keys`. -> what latents of values weigh in fp32 [B,Hq,T,rank of v], lse [B,Hq,T].
    least: tokens worth a program."""
    (B, Hq, T, D), (N, DV) = qs.q.shape, v.shape[1:]
    groups, _, rank = weight.shape
    H, half, q = len(slots), len(freq), qs.q.contiguous()
    R = Hq // H * T
    z, v = (x if x[0].is_contiguous() else x.contiguous() for x in (z, v))
    pos = pos if pos.stride(1) == 1 else pos.contiguous()
    # what fits the registers
    block = 32 if q.dtype != torch.float32 and padded(D) <= 128 and 2 * half == D and padded(DV) <= 512 else 16
    warps = 4 if padded(DV) <= 512 else 8
    per = max(least, -(-N * B * H * warps // _warps(q.device)))
    per = min(-(-per // block), -(-N // block)) * block
    splits = -(-N // per)
    new = functools.partial(torch.empty, device=q.device, dtype=torch.float32)
    o, lse = new(B * H, splits, R, DV), new(B * H, splits, R)
    launch(
        _asked, (B * H, splits), q, z, v, pos, start, weight.contiguous(), bias.contiguous(), slots, freq, o, lse,
        N, splits, per, z.stride(0), v.stride(0), pos.stride(0), qs.scale, qs.softcap or 0.0, scaling,
        CAPPED=qs.softcap is not None, HEADS=H, PER=H // groups, RANK=rank, D=D, HALF=half, HP=padded(half),
        REST=padded(max(1, D - 2 * half)), R=R, RP=padded(R), DV=DV, DVP=padded(DV), BLOCK=block, STEP=32,
        num_warps=warps, num_stages=2,
    )  # fmt: skip
    return joined(qs, o, lse)
