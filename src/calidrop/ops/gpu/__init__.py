"""Kernels in Triton, for CUDA devices. Triton is imported when a kernel is first asked for."""

from __future__ import annotations

import functools
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from calidrop.attention import Partial, Queries
from calidrop.ops import piece
from calidrop.ops.piece import Heard, Piece
from calidrop.tokens import Tokens
from calidrop.window import Window

if TYPE_CHECKING:
    from calidrop.ops.gpu.beside import Remembered

MOST_CHANNELS, MOST_ROWS, MOST_GROUP = 256, 128, 128
WIDEST = 576  # of exact tokens and codes per token with as many channels in their values
UNITS = (64, 128)  # of keys at several widths: a product has 8 columns at least, and a column is a word of 8 codes
MOST_BLOCK = 128  # tokens of which the largest weight is taken
MOST_SUMS = 16 * 1024  # numbers a program adds up: queries times channels
MOST_HEADS = 256  # query heads of which one program finds what they remember


def runs(device: torch.device) -> bool:
    return not reason(device)


@functools.cache
def reason(device: torch.device) -> str:
    """Why Triton's kernels do not run on a device; "" where they do. On CPUs they are interpreted, where both
    CALIDROP_KERNEL=triton and TRITON_INTERPRET=1 say so: for tests."""
    wish = os.environ.get("CALIDROP_KERNEL")
    if device.type not in ("cuda", "cpu"):
        return f"there is none for {device.type}"
    if wish not in (None, "", "triton"):
        return f"CALIDROP_KERNEL={wish}"
    if device.type == "cpu" and (wish != "triton" or os.environ.get("TRITON_INTERPRET") != "1"):
        return "Triton is for GPUs"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than compute capability 8.0"
    try:
        import triton
    except ImportError as error:
        return f"triton cannot be imported: {error}"
    if tuple(int(x) for x in triton.__version__.split(".")[:2]) < (3, 5):  # whose products have 16 columns at least
        return f"triton {triton.__version__} is older than 3.5"
    return ""


def refusal(qs: Queries) -> str:
    """Why `decode` cannot answer these queries; "" where it can."""
    return reason(qs.q.device) or piece.refusal(qs)


def unread(x: Piece, qs: Queries) -> str:
    """Why `decode` cannot read a piece; "" where it can."""
    device, D, rows = qs.q.device, x.queries(qs).shape[-1], qs.q.shape[1] // x.heads * len(qs)
    wide = max(D, x.value_dim) > MOST_CHANNELS
    if rows > MOST_ROWS and not wide:  # where they are not asked some at a time
        return f"{rows} queries per kv head, the kernel takes {MOST_ROWS}"
    if wide and (x.value_dim != D or D > WIDEST):
        return f"{D} and {x.value_dim} channels, the kernel takes {MOST_CHANNELS}, and as many of both up to {WIDEST}"
    if wide and (x.kind not in ("exact", "per token", "e4m3") or x.q is not None or x.mix is not None):
        return f"{D} channels, {x.kind}, the kernel takes {MOST_CHANNELS}"
    if x.pitch() is None:
        return "stored columns do not lie side by side"
    if x.kind == "exact" and x.columns["k"].dtype not in piece.DTYPES:
        return f"tokens are {x.columns['k'].dtype}"
    codes = [c for n, c in x.columns.items() if n in ("k", "v", "k4") and c.dtype == torch.uint8 and x.bits != 3]
    if any(c.shape[-1] % 2 for c in codes):
        return "rows of codes are an odd number of bytes, the kernel reads words of two"
    if x.kind == "e4m3" and device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 9):
        return "the GPU has no 8-bit floats"
    if x.kind == "tiers" and x.bits == 16:
        return "values are exact where channels of keys are of several widths"
    if x.kind == "tiers" and x.group not in UNITS:
        return f"units of {x.group} tokens, the kernel takes {UNITS}"
    if x.kind in ("per channel", "per group", "tiers"):
        sizes = (x.group, x.channels) if x.kind == "per channel" else (x.channels,)
        odd = any(n & (n - 1) or not 8 <= n <= MOST_GROUP for n in sizes)
        return f"groups of {x.group} tokens and {x.channels} channels, the kernel takes 8, 16, ... 128" if odd else ""
    return ""


def decode(qs: Queries, parts: Sequence[Partial | Piece], heard: Heard | None = None) -> Partial:
    from calidrop.ops.gpu.attention import decode

    return decode(qs, parts, heard)


def mass(qs: Queries, lse: Tensor, t: Tokens) -> Tensor:
    from calidrop.ops.gpu.columns import mass

    return mass(qs, lse, t)


def weights(qs: Queries, lse: Tensor, logits: Tensor, largest: bool = False, block: int = 1) -> Tensor:
    from calidrop.ops.gpu.columns import weights

    return weights(qs, lse, logits, largest, block)


def pools(t: Tokens, block: int) -> bool:
    """Whether `weights` can take the largest weight of every `block` tokens."""
    return block & (block - 1) == 0 and block <= MOST_BLOCK and len(t) % block == 0


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    from calidrop.ops.gpu.rounding import rounded

    return rounded(x, bits)


def keys(z: Tensor, pos: Tensor, weight: Tensor, bias: Tensor, order: Tensor, freq: Tensor, scaling: float) -> Tensor:
    from calidrop.ops.gpu.latents import keys

    return keys(z, pos, weight, bias, order, freq, scaling)


def puts(t: Tokens, window: Window) -> bool:
    """Whether `put` can be asked."""
    there = window.k.data is not None and window.before is not None and len(t) == 1 and not t.k.requires_grad
    return there and t.k.stride(-1) == t.v.stride(-1) == 1 and runs(t.k.device)


def put(t: Tokens, window: Window) -> None:
    from calidrop.ops.gpu.beside import put

    put(t, window)


def remembers(q: Tensor) -> bool:
    """Whether `remembered` can be asked."""
    return q.shape[1] <= MOST_HEADS and q.dtype in piece.DTYPES and not q.requires_grad and runs(q.device)


def remembered(
    qs: Queries, held: tuple[Tensor, Tensor, Tensor], order: int, apply: float, recompute: float | None,
    heads: int = 1, late: int = 0, counted: Tensor | None = None,
) -> Remembered:  # fmt: skip
    from calidrop.ops.gpu.beside import remembered

    return remembered(qs, held, order, apply, recompute, heads, late, counted)


def takes_latents(qs: Queries, kv_heads: int, rank: int) -> bool:
    """Whether `ask_latents` can be asked. rank: of values."""
    rows = qs.q.shape[1] // kv_heads * len(qs)
    return not refusal(qs) and qs.q.shape[-1] <= MOST_CHANNELS and max(16, rows) * rank <= MOST_SUMS


def ask_latents(
    qs: Queries, z: Tensor, v: Tensor, pos: Tensor, start: Tensor | None, weight: Tensor, bias: Tensor, slots: Tensor,
    freq: Tensor, scaling: float,
) -> Partial:  # fmt: skip
    from calidrop.ops.gpu.latents import attend

    assert start is not None
    return attend(qs, z, v, pos, start, weight, bias, slots, freq, scaling)
