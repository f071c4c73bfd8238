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
    out, so that the earlier of two is redundant. Works in blocks of rows: no N x N matrix is held for a long prompt.
    """
    B, H, N, _ = t.k.shape
    valid = t.valid
    k = F.normalize(t.k.float(), dim=-1) * valid[..., None]
    total, at = torch.zeros(B, H, N, device=k.device), torch.arange(N, device=k.device)
    block = max(1, SCORE_BYTES // max(1, 4 * B * H * N))
    for start in range(0, N, block):
        row = at[start : start + block, None]
        cos = (k[:, :, start : start + block] @ k.transpose(-1, -2)).masked_fill(row == at, 0.0)  # [B,H,rows,N]
        alike = (cos > ALIKE) & (at > row) if pairs else cos > ALIKE
        last = torch.where(alike, at, -1).amax(-1, keepdim=True)
        total += cos.masked_fill(at == last, 0.0).sum(2)
    mean = total / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.softmax(mean.masked_fill(~valid, float("-inf")), -1).nan_to_num(0.0)
