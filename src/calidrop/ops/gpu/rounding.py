"""Rounding to few bits and packing in Triton, one pass over memory. The oracle is `quant.quantize` and `quant.pack`:
the codes are the same bit by bit (the same fp32 arithmetic, division included, and ties to even)."""

# pyright: basic, reportAttributeAccessIssue=false
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from calidrop.ops.gpu._shared import launch

LARGEST = tl.constexpr(65504.0)  # of fp16
SMALLEST = tl.constexpr(2.0**-24)
HALF = tl.constexpr(12582912.0)  # 1.5 * 2^23: adding it rounds to a whole number, ties to even


@triton.jit(do_not_specialize=["rows"])
def _round(
    x, codes, scale, zero, rows, inner, x_outer, x_inner, x_item,
    GROUP: tl.constexpr, PADDED: tl.constexpr, BITS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """grid (block of groups). Group r begins at (r // inner) * x_outer + (r % inner) * x_inner."""
    per: tl.constexpr = 8 // BITS
    r = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    i, byte = tl.arange(0, PADDED), tl.arange(0, PADDED // per)
    there, item = r < rows, i < GROUP
    place = ((r // inner) * x_outer + (r % inner) * x_inner)[:, None] + i[None, :].to(tl.int64) * x_item
    y = tl.load(x + place, mask=there[:, None] & item[None, :], other=0.0).to(tl.float32)
    y = tl.minimum(tl.maximum(y, -LARGEST), LARGEST)
    low = tl.min(tl.where(item[None, :], y, float("inf")), 1)
    high = tl.max(tl.where(item[None, :], y, float("-inf")), 1)
    z = low.to(tl.float16)
    s = tl.div_rn(high - z.to(tl.float32), tl.full([ROWS], 2.0**BITS - 1.0, tl.float32)).to(tl.float16)
    s = tl.where(s > 0, s, tl.full([ROWS], SMALLEST, tl.float16))
    y = tl.div_rn(y - z.to(tl.float32)[:, None], tl.broadcast_to(s.to(tl.float32)[:, None], (ROWS, PADDED)))
    y = tl.minimum(tl.maximum(y, 0.0), 2.0**BITS - 1.0)
    code = ((y + HALF) - HALF).to(tl.int32)
    code = tl.reshape(code, (ROWS, PADDED // per, per)) << (tl.arange(0, per) * BITS)[None, None, :]
    here = there[:, None] & (byte < GROUP // per)[None, :]
    tl.store(codes + r[:, None] * (GROUP // per) + byte[None, :], tl.sum(code, 2).to(tl.uint8), mask=here)
    tl.store(scale + r, s, mask=there)
    tl.store(zero + r, z, mask=there)


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x: [..., group] of any strides. -> packed uint8 [..., group*bits/8], scale and zero fp16 [...]."""
    group = x.shape[-1]
    outer, inner, strides = _two(x)
    codes = torch.empty(*x.shape[:-1], group * bits // 8, dtype=torch.uint8, device=x.device)
    scale, zero = (torch.empty(x.shape[:-1], dtype=torch.float16, device=x.device) for _ in range(2))
    padded = triton.next_power_of_2(max(group, 8 // bits))
    rows = max(1, 4096 // padded)
    if outer * inner:
        launch(
            _round, (triton.cdiv(outer * inner, rows),), x if strides else x.contiguous(), codes, scale, zero,
            outer * inner, inner, *(strides or (inner * group, group, 1)),
            GROUP=group, PADDED=padded, BITS=bits, ROWS=rows,
        )  # fmt: skip
    return codes, scale, zero


def _two(x: Tensor) -> tuple[int, int, tuple[int, int, int] | None]:
    """The dims in front of the last as two, and the strides of the three; None where they are more than two."""
    dims: list[tuple[int, int]] = []
    for n, step in zip(x.shape[:-1], x.stride()[:-1], strict=True):
        if n == 1:
            continue
        if dims and dims[-1][1] == n * step:
            dims[-1] = (dims[-1][0] * n, step)
        else:
            dims.append((n, step))
    whole = x.shape[:-1].numel()
    if len(dims) > 2:
        return 1, whole, None
    dims = [(1, 0)] * (2 - len(dims)) + dims
    return dims[0][0], dims[1][0], (dims[0][1], dims[1][1], x.stride(-1))
