"""SnapKV for a short prompt and a long answer: a baseline, not a method."""

from __future__ import annotations

import torch
from torch import Tensor

from calidrop import budgets
from calidrop.methods.snapkv import WindowAttention
from calidrop.observe import Observation
from calidrop.parts import Evictor, check_budget, method
from calidrop.tokens import Tokens


class Once(WindowAttention):
    """SnapKV's score the first time there are as many as `most` tokens; what it picks then is best for ever, else newer
    is better."""

    def __init__(self, most: int, picks: int, kernel: int):
        super().__init__(kernel)
        self.most, self.pick = most, budgets.top_k(lambda context: torch.full_like(context, picks))

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        picked = t.stats.get("picked", torch.zeros_like(t.pos))
        first = (t.valid.sum(-1) >= self.most) & ~picked.any(-1)  # [B,H]
        if bool(first.any()):
            best = self.pick(super().__call__(t, obs), t.pos, obs.context)
            picked = torch.where(first[..., None], best, picked).int()
        t.stats["picked"] = picked
        return t.pos.float().masked_fill(picked.bool(), float("inf"))


@method("SnapKV, arXiv 2404.14469, once")
def snapkv_once(budget: int, recent: int = 32, kernel: int = 5, every: int = 16) -> Evictor:
    """SnapKV that looks once: when the budget is first exceeded, half of it goes to the tokens that the last `recent`
    queries attend to, prompt or generated, for good; the other half is a sliding window from then on. It holds as much
    as the others; SnapKV itself would keep a short prompt whole and everything that is generated."""
    check_budget("snapkv_once", budget, recent)
    return Evictor(
        score=lambda layer: Once(budget - recent + 1, budget // 2, kernel),
        amount=budgets.amount(budget, recent),
        recent=recent,
        every=every,
        observe=recent,
    )
