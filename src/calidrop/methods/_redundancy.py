"""R-KV's redundancy: how much a key is like the others it competes with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.attention import SCORE_BYTES
from calidrop.tokens import Tokens

ALIKE = 0.5  # the cosine above which two keys are called similar


def redundancy(t: Tokens, pairs: bool) -> Tensor:
    """softmax over tokens of each key's mean cosine to the others, fp32 [B,H,N]; 0 for empty slots.

    Of every key, the link to the last one similar to it does not count, so that the last of many alike is not
    redundant. As published that leaves a lone pair with no link at all; with `pairs` only links to later keys are left
    out, so that the earlier of two is redundant. No N x N matrix is held: all links of a key together are its product
    with the sum of the others, and what is left out is looked for from the end.
    """
    valid = t.valid
    k = F.normalize(t.k.float(), dim=-1) * valid[..., None]
    total = (k * (k.sum(2, keepdim=True) - k)).sum(-1)
    last = last_alike(k, pairs)
    to = last.clamp(min=0)
    link = (k * k.gather(2, to[..., None].expand_as(k))).sum(-1).masked_fill(last < 0, 0.0)
    mean = total.scatter_add(2, to, -link) / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.softmax(mean.masked_fill(~valid, float("-inf")), -1).nan_to_num(0.0)


def last_alike(k: Tensor, later: bool) -> Tensor:
    """The last other key whose product with each key [B,H,N,D] is above `ALIKE`, int64 [B,H,N], -1 where there is none.
    later: only keys behind it."""
    B, H, N, D = k.shape
    at = torch.arange(N, device=k.device)
    last = torch.full((B, H, N), -1, device=k.device)
    open, stop, width = at.expand(B, H, N), N, 64  # those for which nothing was found among the keys from `stop` on
    while stop and open.shape[2]:
        start = max(0, stop - max(1, min(width, SCORE_BYTES // (4 * open.numel()))))
        column, own = at[start:stop].int(), open[..., None].int()
        rows = k if stop == N else k.gather(2, open[..., None].expand(-1, -1, -1, D))
        cos = rows @ k[:, :, start:stop].transpose(-1, -2)
        alike = (cos > ALIKE) & (column > own if later else column != own)
        found = torch.maximum(torch.where(alike, column, -1).amax(-1), last.gather(2, open))
        last.scatter_(2, open, found)
        left = (found < 0) & (open < start) if later else found < 0
        most = int(left.sum(-1).max())  # of any head; a head with fewer has some of its others looked up in vain
        open = open.gather(2, left.int().argsort(-1, descending=True)[..., :most])
        stop, width = start, 2 * width
    return last
