"""What a step does beside attention, a launch each: the new token goes to a window of fixed memory, and `calidrop`
finds what still answers. The oracles are `Window.append`, and `methods.calidrop.Calibrated` in torch."""

# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false
# pyright: reportArgumentType=false, reportCallIssue=false
from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from calidrop.attention import Queries
from calidrop.ops.gpu._shared import launch
from calidrop.tokens import Tokens
from calidrop.window import Window

STRIDES = ["k_row", "k_head", "v_row", "v_head", "room"]


@triton.jit(do_not_specialize=STRIDES)
def _put(
    k, v, pos, before, to_k, to_v, to_pos, k_row, k_head, v_row, v_head, room,
    H: tl.constexpr, D: tl.constexpr, DP: tl.constexpr, DV: tl.constexpr, DVP: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head). to_k [B,H,room,D], to_v [B,H,room,DV], to_pos [B,H,room]. All tokens have a position."""
    bh = tl.program_id(0).to(tl.int64)
    b, h = bh // H, bh % H
    at = tl.load(pos)
    slot = bh * room + at.to(tl.int64) - tl.load(before)
    d = tl.arange(0, DP)
    tl.store(to_k + slot * D + d, tl.load(k + b * k_row + h * k_head + d, mask=d < D), mask=d < D)
    d = tl.arange(0, DVP)
    tl.store(to_v + slot * DV + d, tl.load(v + b * v_row + h * v_head + d, mask=d < DV), mask=d < DV)
    tl.store(to_pos + slot, at)


def put(t: Tokens, window: Window) -> None:
    """One token of each (row, head), all of one column, to its slot in a window of fixed memory."""
    (B, H, _, D), Dv = t.k.shape, t.v.shape[-1]
    to_k, to_v, to_pos = (x.data for x in (window.k, window.v, window.pos))
    launch(
        _put, (B * H,), t.k, t.v, t.pos, window.before, to_k, to_v, to_pos, *t.k.stride()[:2], *t.v.stride()[:2],
        window.room, H=H, D=D, DP=triton.next_power_of_2(D), DV=Dv, DVP=triton.next_power_of_2(Dv), num_warps=1,
    )  # fmt: skip


@triton.jit
def _remember(
    q, pos, q0, lse0, mean, counted, said, applied, asked, counts, own_q, own_pos, scale, recompute, apply,
    ORDER: tl.constexpr, ASKS: tl.constexpr, LATE: tl.constexpr, H: tl.constexpr, HP: tl.constexpr,
    G: tl.constexpr, GP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (row). q, q0, mean [B,H,G,D], lse0 [B,H,G]. LATE: how many kv heads of a row may ask; 0: all."""
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, HP * GP)
    real = (i // GP < H) & (i % GP < G)
    head = b * H * G + (i // GP) * G + i % GP
    both = tl.zeros([HP * GP], tl.float32)
    new, old, drift = both, both, both
    for start in range(0, D, BLOCK):
        d = start + tl.arange(0, BLOCK)
        place, here = head[:, None] * D + d[None, :], real[:, None] & (d < D)[None, :]
        x = tl.load(q + place, mask=here, other=0.0)
        if LATE:
            tl.store(own_q + place, x, mask=here)
        x, y = x.to(tl.float32), tl.load(q0 + place, mask=here, other=0.0)
        both += tl.sum(x * y, 1)
        new += tl.sum(x * x, 1)
        old += tl.sum(y * y, 1)
        if ORDER == 1:
            drift += tl.sum((x - y) * tl.load(mean + place, mask=here, other=0.0), 1)
    near = both / (tl.maximum(tl.sqrt(new), 1e-8) * tl.maximum(tl.sqrt(old), 1e-8))  # as torch bounds it
    lse = tl.load(lse0 + head, mask=real, other=float("-inf"))
    use = near >= apply
    tl.store(said + head, tl.where(use, lse + scale * drift, float("-inf")), mask=real)
    tl.store(applied + head, use.to(tl.uint8), mask=real)
    if ASKS:
        there = lse > float("-inf")
        ask = there & (near < recompute)
        if LATE:  # the kv heads that drifted furthest
            far = tl.min(tl.reshape(tl.where(ask, near, float("inf")), (HP, GP)), 1)
            n = tl.arange(0, HP)
            ahead = (far[None, :] < far[:, None]) | ((far[None, :] == far[:, None]) & (n[None, :] < n[:, None]))
            first = tl.sum(ahead.to(tl.int32), 1) < LATE
            ask = ask & tl.reshape(tl.broadcast_to(first[:, None], (HP, GP)), (HP * GP,))
            tl.store(own_pos + b, tl.load(pos + b))
        tl.store(asked + head, ask.to(tl.uint8), mask=real)
        asking, could = tl.sum(ask.to(tl.int64), 0), tl.sum(there.to(tl.int64), 0)
        if counted is not None:
            asking += tl.load(counted + 2 * b)
            could += tl.load(counted + 2 * b + 1)
        tl.store(counts + 2 * b, asking)
        tl.store(counts + 2 * b + 1, could)


class Remembered(NamedTuple):
    """said: the lse of what answers [B,Hq,1], -inf where nothing does; applied: whether it does, bool [B,Hq,1]. Where
    heads can be asked again: asked, bool [B,Hq], those that are to be, and counts, int64 [B,2], how many, and how many
    could be, of all steps. asking: a copy of the queries, where that is for a later step."""

    said: Tensor
    applied: Tensor
    asked: Tensor | None
    counts: Tensor | None
    asking: Queries | None


def remembered(
    qs: Queries, held: tuple[Tensor, Tensor, Tensor], order: int, apply: float, recompute: float | None,
    heads: int = 1, late: int = 0, counted: Tensor | None = None,
) -> Remembered:  # fmt: skip
    """A step of `calidrop`. qs.q [B,Hq,1,D]; held: the query [B,Hq,D], lse [B,Hq] and weighted mean key [B,Hq,D] that
    query heads remember, fp32. recompute: None where nobody can be asked again. late: of each row so many of `heads` kv
    heads are asked. counted: the counts so far."""
    B, Hq, _, D = qs.q.shape
    q, (q0, lse0, mean) = qs.q.contiguous(), (x.contiguous() for x in held)
    new = torch.empty_like
    said = new(lse0)
    applied, asked = (new(lse0, dtype=torch.bool) for _ in range(2))
    asks = recompute is not None
    counts = lse0.new_empty(B, 2, dtype=torch.int64) if asks else None
    own = Queries(new(q), new(qs.pos), qs.scale, qs.softcap) if late else None
    HP, GP = triton.next_power_of_2(heads), triton.next_power_of_2(Hq // heads)
    launch(
        _remember, (B,), q, qs.pos.contiguous(), q0, lse0, mean, counted, said, applied.view(torch.uint8),
        asked.view(torch.uint8), counts, own.q if own else None, own.pos if own else None, qs.scale,
        recompute if asks else 0.0, apply, ORDER=order, ASKS=asks, LATE=late, H=heads, HP=HP, G=Hq // heads, GP=GP,
        D=D, BLOCK=max(16, min(64, 4096 // (HP * GP))),
    )  # fmt: skip
    return Remembered(said[..., None], applied[..., None], asked if asks else None, counts, own)
