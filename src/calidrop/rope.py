"""Rotary positions: taking them off, putting them on, averaging over them."""

from __future__ import annotations

import torch
from torch import Tensor


class Rope:
    """inv_freq: [rotated dims / 2]; below 0 where a model turns the other way. Dims behind the rotated ones pass
    through (partial rotary). interleaved: the two dims of a pair lie side by side; else half of the rotated dims
    apart."""

    def __init__(self, inv_freq: Tensor, interleaved: bool = False):
        self.inv_freq, self.interleaved = inv_freq, interleaved

    def __deepcopy__(self, memo: dict) -> Rope:
        return self  # a constant of the model

    def rotate(self, x: Tensor, pos: Tensor) -> Tensor:
        """x: [..., N, D], pos: broadcasts to [..., N]; a negative pos un-rotates. Exact up to fp32 rounding."""
        angle = pos[..., None].float() * self.inv_freq.to(x.device)
        return self.turn(x, angle.cos(), angle.sin())

    def turn(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Apply the block rotation with the given cos and sin [..., rotated dims / 2] (which may be averages)."""
        half = self.inv_freq.shape[0]
        x = x.float()
        rest = x[..., 2 * half :]
        if self.interleaved:
            a, b = x[..., : 2 * half].unflatten(-1, (half, 2)).unbind(-1)
        else:
            a, b = x[..., :half], x[..., half : 2 * half]
        pairs = torch.addcmul(a * cos, b, sin, value=-1), torch.addcmul(b * cos, a, sin)
        if self.interleaved:
            return torch.cat([torch.stack(pairs, -1).flatten(-2), rest], -1)
        return torch.cat([*pairs, rest], -1)

    def mean_turn(self, start: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """cos and sin averaged over positions start .. start+count-1. start: [B] -> [B, rotated dims / 2] each."""
        steps = torch.arange(count, device=start.device)
        angle = (start[:, None] + steps)[..., None].float() * self.inv_freq.to(start.device)
        return angle.cos().mean(1), angle.sin().mean(1)
