from torch import Tensor

from calidrop import budgets
from calidrop.observe import Observation
from calidrop.parallel import HeadGroup
from calidrop.parts import Evictor, check_budget, check_every, method
from calidrop.store import Score
from calidrop.tokens import Tokens


class LastQuery(Score):
    def __init__(self, heads: HeadGroup):
        self.heads = heads

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        mean = self.heads.gather(obs.last(1).mean_weights(t)).mean(1, keepdim=True)
        return mean.expand(t.pos.shape)


@method("TOVA, arXiv 2401.06104")
def tova(budget: int | float, recent: int = 1, every: int | None = 16) -> Evictor:
    """TOVA (Oren et al., arXiv 2401.06104, sec. 3.2): what the last query attends to, mean over all heads of the layer.

    Deviation: eviction runs every `every` steps instead of each (`every=1` is the paper's). The mean over heads assumes
    that heads hold the same tokens, which holds since they share the scores.
    """
    check_budget("tova", budget, recent)
    check_every("tova", every)
    return Evictor(
        score=lambda layer: LastQuery(layer.heads),
        amount=budgets.amount(budget, recent),
        recent=recent,
        every=every,
        per_head=False,
    )
