"""Orthonormal Hadamard rotation of the last dim: it spreads outlier channels and changes no dot product."""

from __future__ import annotations

import functools

import torch
from torch import Tensor


def hadamard(x: Tensor) -> Tensor:
    """x: [...,D] fp32. Rotates blocks of the largest power of two that divides D. Its own inverse."""
    block = x.shape[-1] & -x.shape[-1]
    return (x.unflatten(-1, (-1, block)) @ _block(block, x.device, x.dtype) * block**-0.5).flatten(-2)


@functools.cache
def signs(D: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[D,D]: the rotation as a matrix of 1, -1 and 0, not divided by the root of its block: exact in any dtype."""
    block = D & -D
    return torch.kron(torch.eye(D // block, device=device, dtype=dtype), _block(block, device, dtype))


@functools.cache
@torch.inference_mode(False)  # it is kept, and a training may use it later
def _block(n: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    as_told = {"device": device, "dtype": dtype}
    matrix, two = torch.ones(1, 1, **as_told), torch.tensor([[1.0, 1.0], [1.0, -1.0]], **as_told)
    while len(matrix) < n:
        matrix = torch.kron(matrix, two)
    return matrix
