"""Rounding to few bits and packing the codes. Groups lie along the last dim; metadata is fp16.

Asymmetric round-to-nearest: code = round((x - zero) / scale), x ~ code * scale + zero, with zero = min and
scale = (max - min) / (2^bits - 1). Codes are computed with the fp16-rounded scale and zero, since those are the ones
that decode them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from calidrop.ops import gpu

LARGEST = torch.finfo(torch.float16).max
SMALLEST = 2.0**-24  # above 0 in fp16: the scale of groups that are all but constant


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """x: [..., group]. -> codes uint8 [..., group], scale fp16 [...], zero fp16 [...]."""
    x = x.float().clamp(-LARGEST, LARGEST)  # beyond, fp16 zeros would be infinite and codes NaN
    low, high = x.amin(-1), x.amax(-1)
    zero = low.to(torch.float16)
    # rounding zero to fp16 moves it; the scale must still reach the maximum
    steps = high.new_full((), 2**bits - 1)  # a tensor: on GPUs torch multiplies by the reciprocal of a number
    scale = ((high - zero.float()) / steps).to(torch.float16)
    scale = scale.clamp(min=SMALLEST)
    codes = ((x - zero.float()[..., None]) / scale.float()[..., None]).round().clamp(0, 2**bits - 1)
    return codes.to(torch.uint8), scale, zero


def dequantize(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """codes: uint8 [..., group], scale and zero: [...]. -> fp32."""
    return codes * scale.float()[..., None] + zero.float()[..., None]


def pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [..., n] with one code each -> uint8 [..., n*bits/8], first code in the low bits. n must fill whole bytes
    (3 bits: eight codes in three bytes)."""
    if bits == 3:
        eight = codes.unflatten(-1, (-1, 8)).to(torch.int32) << torch.arange(0, 24, 3, device=codes.device)
        word = eight.sum(-1, dtype=torch.int32)[..., None]
        return (word >> torch.arange(0, 24, 8, device=codes.device)).bitwise_and(255).to(torch.uint8).flatten(-2)
    per_byte = 8 // bits
    parts = codes.unflatten(-1, (-1, per_byte))
    packed = parts[..., 0].clone()
    for i in range(1, per_byte):
        packed |= parts[..., i] << (bits * i)
    return packed


def unpack(packed: Tensor, bits: int) -> Tensor:
    """The inverse of `pack`."""
    if bits == 3:
        three = packed.unflatten(-1, (-1, 3)).to(torch.int32) << torch.arange(0, 24, 8, device=packed.device)
        word = three.sum(-1, dtype=torch.int32)[..., None]
        return (word >> torch.arange(0, 24, 3, device=packed.device)).bitwise_and(7).to(torch.uint8).flatten(-2)
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
    return ((packed[..., None] >> shifts) & (2**bits - 1)).flatten(-2)


def rounded(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """`quantize` and `pack`. x: [..., group], which fills whole bytes -> packed [..., group*bits/8], scale, zero."""
    if bits != 3 and gpu.runs(x.device):
        return gpu.rounded(x, bits)
    codes, scale, zero = quantize(x, bits)
    return pack(codes, bits), scale, zero


def whole_bytes(n: int, bits: int) -> bool:
    """Whether n codes fill whole bytes (whole triples of bytes at 3 bits)."""
    return n % (8 if bits == 3 else 8 // bits) == 0
