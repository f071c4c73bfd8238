import torch.nn.functional as F
from torch import Tensor

from calidrop import budgets
from calidrop.observe import Observation
from calidrop.parts import Evictor, check_budget, check_every, check_int, method
from calidrop.store import Score
from calidrop.tokens import Tokens


class WindowAttention(Score):
    """What the last queries attend to, smoothed over neighbouring positions."""

    def __init__(self, kernel: int):
        self.kernel = kernel

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        weights = obs.mean_weights(t)  # pads weigh 0, so they add nothing to their neighbours
        return F.avg_pool1d(weights, self.kernel, 1, self.kernel // 2)


def check_window(name: str, budget: int | float, recent: int, kernel: int, every: int | None) -> None:
    check_budget(name, budget, recent)
    check_int(f"{name}: recent", recent, 1)
    check_int(f"{name}: kernel", kernel, 1)
    if kernel % 2 == 0:
        raise ValueError(f"{name}: kernel must be odd, got {kernel}")
    check_every(name, every)


@method("SnapKV, arXiv 2404.14469")
def snapkv(budget: int | float, recent: int = 32, kernel: int = 5, every: int | None = None) -> Evictor:
    """SnapKV (Li et al., arXiv 2404.14469, sec. 4.2): the prompt tokens that its last `recent` queries attend to.

    recent: the observation window, itself always kept. kernel: width of the average pooling over positions. Softmax
    over all keys, mean over the window and over the query group of a kv head, as in kvpress. every: compress generated
    tokens too, each so many steps (not in the paper).

    Deviation: weights are averaged over the group before pooling rather than after, which is the same number.
    """
    check_window("snapkv", budget, recent, kernel, every)
    return Evictor(
        score=lambda layer: WindowAttention(kernel),
        amount=budgets.amount(budget, recent),
        recent=recent,
        every=every,
        observe=recent,
    )
