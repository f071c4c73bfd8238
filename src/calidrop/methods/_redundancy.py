"""R-KV's redundancy: how much a key is like the others it competes with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.ops import alike
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
    last = alike.last_alike(k, ALIKE, pairs)
    to = last.clamp(min=0)
    link = (k * k.gather(2, to[..., None].expand_as(k))).sum(-1).masked_fill(last < 0, 0.0)
    mean = total.scatter_add(2, to, -link) / valid.sum(-1, keepdim=True).clamp(min=1)
    return torch.softmax(mean.masked_fill(~valid, float("-inf")), -1).nan_to_num(0.0)
