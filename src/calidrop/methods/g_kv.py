import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop import budgets
from calidrop.attention import logits
from calidrop.budgets import Amount
from calidrop.methods._redundancy import redundancy
from calidrop.observe import Observation
from calidrop.parts import Evictor, check_budget, check_choice, check_every, check_int, check_number, method
from calidrop.store import Score, real
from calidrop.tokens import Tokens

HISTORIES = ("max", "mean", "sum")
TINY = torch.finfo(torch.float32).tiny


class GlobalScore(Score):
    """What the last queries attend to, joined with what earlier windows did, less how redundant a key is.

    amount: how many tokens of the length so far stay beside the window. history: how the two are joined, None for not
    at all. rkv: importance and scales of R-KV instead of G-KV."""

    def __init__(
        self, amount: Amount, history: str | None, decay: float, mix: float, kernel: int, pairs: bool, rkv: bool = False
    ):
        self.amount, self.history, self.decay, self.mix = amount, history, decay, mix
        self.kernel, self.pairs, self.rkv = kernel, pairs, rkv

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        score = self.importance(t, obs)
        if self.history is not None:
            before = t.stats["attended"] if "attended" in t.stats else torch.zeros_like(score)
            score = self.joined(score, before)
            crowded = t.valid.sum(-1, keepdim=True) > self.amount(obs.length)[:, None, None]
            t.stats = {**t.stats, "attended": torch.where(crowded, score, before)}  # begins when something has to go
        score = F.max_pool1d(real(score, t.valid), self.kernel, 1, self.kernel // 2)
        if self.mix == 1:
            return score
        other = redundancy(t, self.pairs)
        return self.mix * score - (1 - self.mix) * (other if self.rkv else scaled(other))

    def importance(self, t: Tokens, obs: Observation) -> Tensor:
        if not self.rkv:
            return scaled(obs.mean_weights(t, "max"))
        among = torch.softmax(logits(obs.queries, t.k, t.pos).amax(2), -1)  # of the tokens that may go, not the window
        return obs.mean(among.nan_to_num(0.0))  # a query that is a pad sees none of them

    def joined(self, now: Tensor, before: Tensor) -> Tensor:
        """0 in `before` marks a token without history; a score that is kept is never quite 0."""
        if self.history == "max":
            now = torch.maximum(self.decay * before, now)
        elif self.history == "sum":
            now = self.decay * before + now
        else:
            now = torch.where(before > 0, self.decay * before + (1 - self.decay) * now, now)
        return now.clamp(min=TINY)


def scaled(x: Tensor) -> Tensor:
    """With the largest of each head at 1."""
    return x / x.amax(-1, keepdim=True).clamp(min=TINY)


def growing(budget: int | float, recent: int, least: int) -> Amount:
    """Asked with the tokens so far: `budget` of them, at least `least`, less the recent ones."""
    amount = budgets.amount(budget, recent)
    return lambda length: amount(length).clamp(min=least - recent)


def check(name: str, budget: int | float, every: int | None, recent: int, least: int, mix: float, pairs: bool) -> None:
    check_budget(name, budget, recent)
    check_every(name, every)
    check_int(f"{name}: recent", recent, 1)
    check_int(f"{name}: least", least, 0)
    if least and isinstance(budget, int):
        raise ValueError(f"{name}: least goes with a budget that is a fraction, got budget={budget} and least={least}")
    check_number(f"{name}: mix", mix, 0.0, 1.0)
    check_choice(f"{name}: pairs", pairs, (False, True))


@method("G-KV, arXiv 2512.00504")
def g_kv(
    budget: int | float = 512,
    every: int | None = 128,
    recent: int = 16,
    decay: float = 0.8,
    mix: float = 0.5,
    history: str = "max",
    pairs: bool = False,
    least: int = 0,
) -> Evictor:
    """G-KV (microsoft/G-KV, arXiv 2512.00504): attention of the last window, remembered over windows, less
    redundancy; every so many generated tokens.

    budget: tokens per kv head, `recent` included, or a fraction of the tokens there are by then, generated ones too (at
    least `least` tokens). every: generated tokens between two compressions; the cache grows to budget + every between
    them (None: the prompt alone). recent: the observed queries; their tokens are kept. A window's score is its mean
    softmax weight, max over the query group, divided by the largest of the head. history: the score of a token is the
    "max" of it and decay times what it was, their "mean" weighted by decay, or the "sum". mix: weight of that score
    against R-KV's redundancy of keys (1: no redundancy). pairs: the earlier of just two similar keys is redundant too;
    as published only three and more are. Holds 4 bytes more per token and kv head.

    Deviations: redundancy is among the tokens that may go, not the window; of a key with no similar one no link is left
    out. Weights are those the queries had when they were asked: with `every` below `recent` some saw tokens now gone.
    "sum" does not begin with the whole prompt's attention (see `h2o`). CAKE's and SnapKV's variants are left out.
    """
    check("g_kv", budget, every, recent, least, mix, pairs)
    check_number("g_kv: decay", decay, 0.0, 1.0)
    check_choice("g_kv: history", history, HISTORIES)
    amount = growing(budget, recent, least)
    return Evictor(
        score=lambda layer: GlobalScore(amount, history, decay, mix, 1, pairs),
        amount=amount,
        growing=True,
        recent=recent,
        every=every,
        observe=recent,
    )
