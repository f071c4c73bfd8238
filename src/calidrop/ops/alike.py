"""For each key the last one that is like it, without holding all products."""

from __future__ import annotations

import torch
from torch import Tensor

from calidrop.attention import SCORE_BYTES
from calidrop.ops import cpu


def last_alike(k: Tensor, limit: float, later: bool) -> Tensor:
    """The last other key whose product with each key [B,H,N,D] is above `limit`, int64 [B,H,N], -1 where there is none.
    later: only keys behind it."""
    return cpu.last_alike(k, limit, later) if cpu.compares(k) else in_torch(k, limit, later)


def in_torch(k: Tensor, limit: float, later: bool) -> Tensor:
    """`last_alike` without a kernel: keys in blocks from the end, ever wider as fewer are left that look."""
    B, H, N, D = k.shape
    at = torch.arange(N, device=k.device)
    last = torch.full((B, H, N), -1, device=k.device)
    open, stop, width = at.expand(B, H, N), N, 64  # those for which nothing was found among the keys from `stop` on
    while stop and open.shape[2]:
        start = max(0, stop - max(1, min(width, SCORE_BYTES // (4 * open.numel()))))
        column, own = at[start:stop].int(), open[..., None].int()
        rows = k if stop == N else k.gather(2, open[..., None].expand(-1, -1, -1, D))
        cos = rows @ k[:, :, start:stop].transpose(-1, -2)
        alike = (cos > limit) & (column > own if later else column != own)
        found = torch.maximum(torch.where(alike, column, -1).amax(-1), last.gather(2, open))
        last.scatter_(2, open, found)
        left = (found < 0) & (open < start) if later else found < 0
        most = int(left.sum(-1).max())  # of any head; a head with fewer has some of its others looked up in vain
        open = open.gather(2, left.int().argsort(-1, descending=True)[..., :most])
        stop, width = start, 2 * width
    return last
