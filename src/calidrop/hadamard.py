"""Orthonormal Hadamard rotation of the last dim: it spreads outlier channels and changes no dot product."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x: [...,D] fp32. Rotates blocks of the largest power of two that divides D. Its own inverse."""
    D = x.shape[-1]
    block = D & -D
    y, half = x.unflatten(-1, (-1, block)), 1
    while half < block:
        pairs = y.unflatten(-1, (-1, 2, half))
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        y = torch.stack([a + b, a - b], -2).flatten(-3)
        half *= 2
    return (y * block**-0.5).flatten(-2)


@functools.cache
def signs(D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[D,D]: the rotation as a matrix of 1, -1 and 0, not divided by the root of its block: exact in any dtype."""
    block = D & -D
    return (hadamard(torch.eye(D)) * block**0.5).round().to(device, dtype)
