from torch import Tensor

from calidrop import budgets
from calidrop.observe import Observation
from calidrop.parts import Evictor, check_budget, check_every, check_int, method
from calidrop.store import Score
from calidrop.tokens import Tokens


class FirstAndLast(Score):
    """Newer is better, and the first `sinks` are best."""

    def __init__(self, sinks: int):
        self.sinks = sinks

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        index = obs.index(t).float()
        return index.masked_fill(index < self.sinks, float("inf"))


@method("StreamingLLM, arXiv 2309.17453")
def streaming_llm(budget: int | float, sinks: int = 4, recent: int = 1, every: int | None = 16) -> Evictor:
    """StreamingLLM (Xiao et al., arXiv 2309.17453, sec. 3.2): the first `sinks` tokens and the most recent ones.

    Deviations: keys keep the positions they were rotated with (the paper re-rotates to positions inside the cache),
    since decoding beyond the trained length is not what this is for; eviction runs every `every` steps instead of each
    (`every=1` is the paper's), so up to `every` more recent tokens are seen.
    """
    check_budget("streaming_llm", budget, recent)
    check_int("streaming_llm: sinks", sinks, 0)
    check_every("streaming_llm", every)
    if isinstance(budget, int) and sinks + recent > budget:
        raise ValueError(f"streaming_llm: sinks + recent must fit in budget, got {sinks} + {recent} > {budget}")
    return Evictor(
        score=lambda layer: FirstAndLast(sinks),
        amount=budgets.amount(budget, recent),
        recent=recent,
        every=every,
        per_head=False,
    )
