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
def code(x, I: tl.constexpr, KIND: tl.constexpr, BITS: tl.constexpr, HALF: tl.constexpr, dtype: tl.constexpr):
    """The I-th code of every word (int16 from memory, the first code in its low bits) as a number of type fp32 or fp16,
    less HALF: exact in both. Words decode where they lie, so that none moves between threads: what follows treats the
    I-th codes of all words as a matrix of its own."""
    if INTERPRETED or dtype == tl.float32:
        y = (x >> (I * BITS)) & (2**BITS - 1)
        if KIND == 3:
            y = y.to(tl.uint8).to(tl.float8e4nv, bitcast=True)
        y = (y.to(tl.float32) - HALF).to(dtype)
    elif KIND == 3:
        y = tl.inline_asm_elementwise(
            f"""{{ .reg .b32 a; .reg .b16 b, c;
            prmt.b32 a, $1, 0, {0x20 + I * 0x11};
            mov.b32 {{b, c}}, a;
            cvt.rn.f16x2.e4m3x2 $0, b; }}""",
            "=r,r", [x], tl.float16, True, 2,
        )  # fmt: skip
    else:  # bits of a code below the exponent of 1024 are 1024 + code * 2^at: no conversion, two words at once
        at: tl.constexpr = I * BITS % 8
        y = tl.inline_asm_elementwise(
            f"""{{ .reg .b32 a, b, c;
            shr.b32 a, $1, {I * BITS // 8 * 8};
            lop3.b32 a, a, {(2**BITS - 1) * 2**at * 0x10001}, 0x64006400, 0xea;
            mov.b32 b, {(15 - at) * 0x400 * 0x10001};
            mov.b32 c, {(0x8000 + (25 - at) * 0x400 + HALF * 2**at) * 0x10001};
            fma.rn.f16x2 $0, a, b, c; }}""",
            "=r,r", [x], tl.float16, True, 2,
        )  # fmt: skip
    return y


@triton.jit
def exp2(x):
    """In one instruction (what is less than 2^-126 is 0)."""
    if INTERPRETED:
        y = tl.exp2(x)
    else:
        y = tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def log2(x):
    if INTERPRETED:
        y = tl.log2(x)
    else:
        y = tl.inline_asm_elementwise("lg2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, True, 1)
    return y


@triton.jit
def woven(x, P: tl.constexpr):
    """P matrices [rows,n], of every P-th column -> [rows,n*P]."""
    if P == 1:
        y = x[0]
    elif P == 2:
        y = tl.join(x[0], x[1])
    elif P == 4:
        y = tl.join(tl.join(x[0], x[2]), tl.join(x[1], x[3]))
    else:
        even = tl.join(tl.join(x[0], x[4]), tl.join(x[2], x[6]))
        y = tl.join(even, tl.join(tl.join(x[1], x[5]), tl.join(x[3], x[7])))
    return tl.reshape(y, (x[0].shape[0], x[0].shape[1] * P))


@triton.jit
def product(a, b, acc=None):
    """Matrix product, added to acc, operands of one dtype, summed in fp32 (fp32 operands: without tf32)."""
    if INTERPRETED:  # which would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision="ieee")


def padded(n: int) -> int:
    """The least power of two that a matrix product takes."""
    return max(16, 1 << (n - 1).bit_length())


def launch(kernel: Any, grid: tuple[int, ...], *args: Any, **options: Any) -> None:
    """Run a kernel where its first argument lies (Triton itself takes the current device)."""
    device = args[0].device
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)
