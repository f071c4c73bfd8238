"""Column sums of attention in Triton: what all observed queries pay each key, without a queries x keys matrix.

The oracle is `ops.mass_in_torch`: exp(logits - lse) summed over queries, averaged over a kv head's query group.
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
