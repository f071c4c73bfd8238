"""Column sums of attention in Triton: what all observed queries pay each key, without a queries x keys matrix.

The oracles are `ops.mass_in_torch`, exp(logits - lse) summed over queries, averaged over a kv head's query group, and
`ops.weights_in_torch`, of one query.
"""

# pyright: basic, reportOperatorIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calidrop.attention import Queries
from calidrop.ops.gpu._shared import launch, padded, product
from calidrop.tokens import Tokens

STRIDES = ["W", "N", "k_row", "k_head", "k_slot", "pos_row", "pos_head", "pos_slot"]


@triton.jit(do_not_specialize=STRIDES)
def _mass(
    q, q_pos, lse, k, pos, out, W, N, k_row, k_head, k_slot, pos_row, pos_head, pos_slot, scale, softcap,
    CAPPED: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, DP: tl.constexpr,
    BLOCK: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head, block of keys). q [B,H,G*W,D], lse [B,H,G*W]."""
    bh = tl.program_id(0)
    b, h = (bh // H).to(tl.int64), (bh % H).to(tl.int64)
    n, d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK), tl.arange(0, DP)
    there = n < N
    column = n.to(tl.int64)
    at = tl.load(pos + b * pos_row + h * pos_head + column * pos_slot, mask=there, other=-1)
    there = there & (at >= 0)
    first = tl.min(tl.where(there, at, 2147483647), 0)
    place = k + b * k_row + h * k_head + column[:, None] * k_slot + d[None, :]
    keys = tl.trans(tl.load(place, mask=there[:, None] & (d < D)[None, :], other=0.0))
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, G * W, ROWS):
        r = start + tl.arange(0, ROWS)
        real = r < G * W
        asked = tl.load(q_pos + b * W + r % W, mask=real, other=-1)
        if tl.max(asked, 0) >= first:  # else all of them came before these keys
            row = bh.to(tl.int64) * G * W + r
            x = tl.load(q + row[:, None] * D + d[None, :], mask=real[:, None] & (d < D)[None, :], other=0.0)
            s = product(x.to(keys.dtype), keys) * scale
            if CAPPED:
                s = softcap * (2.0 * tl.sigmoid(2.0 * s / softcap) - 1.0)  # tanh
            norm = tl.load(lse + row, mask=real, other=0.0)
            norm = tl.where(norm == float("-inf"), 0.0, norm)
            seen = there[None, :] & real[:, None] & (at[None, :] <= asked[:, None])
            total += tl.sum(tl.where(seen, tl.exp(s - norm[:, None]), 0.0), 0)
    tl.store(out + bh.to(tl.int64) * N + n, total / G, mask=n < N)


def mass(qs: Queries, lse: Tensor, t: Tokens) -> Tensor:
    """qs.q [B,Hq,W,D], lse [B,Hq,W] over everything they saw -> fp32 [B,H,N]; empty slots weigh 0."""
    B, Hq, W, D = qs.q.shape
    H, N = t.k.shape[1:3]
    out = torch.empty(B, H, N, device=qs.q.device, dtype=torch.float32)
    k = t.k if t.k.stride(-1) == 1 else t.k.contiguous()
    block, rows = (64 if D <= 128 else 32), min(64, padded(Hq // H * W))
    launch(
        _mass, (B * H, triton.cdiv(N, block)), qs.q.contiguous(), qs.pos.contiguous(), lse.float().contiguous(),
        k, t.pos, out, W, N, *k.stride()[:3], *t.pos.stride(), qs.scale, qs.softcap or 0.0,
        CAPPED=qs.softcap is not None, H=H, G=Hq // H, D=D, DP=padded(D), BLOCK=block, ROWS=rows, num_stages=2,
    )  # fmt: skip
    return out


@triton.jit(do_not_specialize=["N"])
def _weights(
    logits, lse, q_pos, out, N, LARGEST: tl.constexpr, H: tl.constexpr, G: tl.constexpr, POOL: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """grid (row and kv head, block of tokens). logits [B,H,G,N], lse [B,H,G]."""
    bh = tl.program_id(0)
    n = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK // POOL], tl.float32)
    for g in range(G):
        row = bh.to(tl.int64) * G + g
        norm = tl.load(lse + row)
        norm = tl.where(norm == float("-inf"), 0.0, norm)
        w = tl.exp(tl.load(logits + row * N + n, mask=n < N, other=float("-inf")) - norm)
        if POOL > 1:
            w = tl.max(tl.reshape(w, (BLOCK // POOL, POOL)), 1)
        total = tl.maximum(total, w) if LARGEST else total + w
    if not LARGEST:
        total /= G
    total = tl.where(tl.load(q_pos + bh // H) >= 0, total, 0.0)
    i = tl.program_id(1) * (BLOCK // POOL) + tl.arange(0, BLOCK // POOL)
    tl.store(out + bh.to(tl.int64) * (N // POOL) + i, total, mask=i < N // POOL)


def weights(qs: Queries, lse: Tensor, logits: Tensor, largest: bool = False, block: int = 1) -> Tensor:
    """`ops.weights` of one query whose logits [B,H,G,N] are there, as `decode` leaves them: [B,H,N/block]."""
    B, H, G, N = logits.shape
    out = torch.empty(B, H, N // block, device=logits.device, dtype=torch.float32)
    launch(
        _weights, (B * H, triton.cdiv(N, 1024)), logits, lse.float().contiguous(), qs.pos.contiguous(), out, N,
        LARGEST=largest, H=H, G=G, POOL=block, BLOCK=1024,
    )  # fmt: skip
    return out
