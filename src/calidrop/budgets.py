"""How many tokens stay: masks from scores. A budget never sees keys, a score never sees budgets.

Ties keep the older token. All functions give a bool mask [B,H,N] and never mark an empty slot.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calidrop.parallel import HeadGroup
from calidrop.store import Budget, real

Amount = Callable[[Tensor], Tensor]
"""context int [B] -> tokens per kv head, int [B]."""


def amount(budget: int | float, recent: int) -> Amount:
    """`budget` tokens (int) or that fraction of the prompt (float), less the `recent` ones kept in the window."""
    if isinstance(budget, int):
        return lambda context: torch.full_like(context, budget - recent)
    return lambda context: ((context * budget).floor().long() - recent).clamp(min=0)


def best(score: Float[Tensor, "B M"], n: Int[Tensor, " B"]) -> Bool[Tensor, "B M"]:
    """Marks the n[b] largest of each row."""
    order = score.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.empty_like(order).scatter_(
        -1, order, torch.arange(score.shape[-1], device=score.device).expand_as(order)
    )
    return rank < n[:, None]


def top_k(n: Amount) -> Budget:
    """The n best of every kv head."""

    def budget(score: Tensor, pos: Tensor, context: Tensor) -> Tensor:
        B, H, N = score.shape
        valid = pos >= 0
        marks = best(real(score, valid).reshape(B * H, N), n(context).repeat_interleave(H))
        return marks.view(B, H, N) & valid

    return budget


def across_heads(n: Amount, floor: float, group: HeadGroup) -> Budget:
    """The n*H best of all kv heads together, each head sure of its best floor*n (AdaKV, arXiv 2407.11550, alg. 1).

    `group` spans the heads that other processes hold (tensor parallel)."""

    def budget(score: Tensor, pos: Tensor, context: Tensor) -> Tensor:
        B, H, N = score.shape
        share, valid = n(context), pos >= 0
        s = real(score, valid)
        safe = best(s.reshape(B * H, N), (share * floor).long().repeat_interleave(H)).view(B, H, N) & valid
        s = F.pad(s.masked_fill(safe, float("inf")), (0, group.longest(s) - N), value=float("-inf"))
        everyone = group.gather(s)  # [B,H_all,N_all]
        marks = best(everyone.reshape(B, -1), share * everyone.shape[1]).view_as(everyone)
        return group.mine(marks)[..., :N] & valid

    return budget


def pyramid(n: Amount, layer: int, layers: int, beta: float, recent: int) -> Amount:
    """A layer's share of an average n: linear from 2n - n/beta at the bottom to n/beta at the top
    (PyramidKV, arXiv 2406.02069, sec. 3.2). Where the bottom layer would get more than the prompt has,
    the slope is flattened so that the average stays."""

    def share(context: Tensor) -> Tensor:
        mean = n(context).float()
        high = torch.minimum(2 * mean - mean / beta, torch.maximum(context.float() - recent, mean))
        step = (2 * high - 2 * mean) / max(1, layers - 1)
        return (high - layer * step if layers > 1 else mean).round().long()

    return share
