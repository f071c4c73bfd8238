from torch import Tensor

from calidrop import budgets
from calidrop.observe import Observation
from calidrop.parts import Evictor, check_budget, check_every, check_number, method
from calidrop.store import Score
from calidrop.tokens import Tokens


class AccumulatedAttention(Score):
    """Column sums of the attention matrix over every query so far; the last `recent` of the budget are best."""

    tracks = sums = True

    def __init__(self, budget: int | float, recent: float):
        self.budget, self.recent = budget, recent

    def stats(self, t: Tokens, step: Observation) -> dict[str, Tensor]:
        new = step.total_weights(t)
        return {"mass": t.stats["mass"] + new if "mass" in t.stats else new}

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        total = budgets.amount(self.budget, 0)(obs.context)
        forced = (total * self.recent).floor()  # [B]
        newest = obs.queries.pos[:, -1]
        return t.stats["mass"].masked_fill(t.pos > (newest - forced)[:, None, None], float("inf"))


@method("H2O, arXiv 2306.14048")
def h2o(budget: int | float, recent: float = 0.5, every: int | None = 16) -> Evictor:
    """H2O (Zhang et al., arXiv 2306.14048, alg. 1): heavy hitters by accumulated attention, and recent tokens.

    recent: the part of the budget that goes to the most recent tokens, a fraction. Sums run over all queries, prompt
    and generated, per kv head (mean over its query group). Deviation: eviction runs every `every` steps instead of each
    (`every=1` is the paper's).
    """
    check_budget("h2o", budget, 1)
    check_number("h2o: recent", recent, 0.0, 1.0)
    check_every("h2o", every)
    return Evictor(
        score=lambda layer: AccumulatedAttention(budget, recent),
        amount=budgets.amount(budget, 1),
        recent=1,
        every=every,
    )
