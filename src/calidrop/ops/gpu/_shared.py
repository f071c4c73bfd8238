"""What the kernels share."""

from __future__ import annotations

import os
from contextlib import nullcontext
from typing import Any

import torch
import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def unpacked(x, KIND: tl.constexpr, BITS: tl.constexpr):
    """What memory holds as numbers. Codes, the first in a byte's low bits: [..., bytes] -> int8 [..., codes], less half
    their range, so that rounding what they are multiplied with does not push all channels one way."""
    if KIND == 3:
        y = x.to(tl.float8e4nv, bitcast=True).to(tl.float32)
    elif KIND == 0:
        y = x
    else:
        if BITS == 8:
            y = x
        else:
            if BITS == 4:
                y = tl.join(x & 15, x >> 4)
            else:
                y = tl.join(tl.join(x & 3, (x >> 4) & 3), tl.join((x >> 2) & 3, x >> 6))
            y = tl.reshape(y, x.shape[:-1] + [x.shape[-1] * (8 // BITS)])
        y = (y - 2 ** (BITS - 1)).to(tl.int8, bitcast=True)
        if INTERPRETED:  # which knows no way from integers to bf16
            y = y.to(tl.float32)
    return y


@triton.jit
def product(a, b):
    """Matrix product, operands of one dtype, summed in fp32 (fp32 operands: without tf32)."""
    if INTERPRETED:  # which would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, input_precision="ieee")


def padded(n: int) -> int:
    """The least power of two that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel where its first argument lies (Triton itself takes the current device)."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)
