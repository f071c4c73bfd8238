from calidrop import budgets
from calidrop.methods.snapkv import WindowAttention, check_window
from calidrop.parts import Evictor, check_number, method


@method("AdaKV, arXiv 2407.11550")
def adakv(
    budget: int | float, recent: int = 32, kernel: int = 5, floor: float = 0.2, every: int | None = None
) -> Evictor:
    """AdaKV (Feng et al., arXiv 2407.11550, alg. 1) on SnapKV's scores: the heads of a layer share their budget.

    budget: the mean over heads; floor: the fraction of it every head is sure of. Heads are stored at their own length.
    Under tensor parallelism scores are gathered, so the split is that of one process.
    """
    check_window("adakv", budget, recent, kernel, every)
    check_number("adakv: floor", floor, 0.0, 1.0)
    return Evictor(
        score=lambda layer: WindowAttention(kernel),
        amount=budgets.amount(budget, recent),
        keep=lambda layer, n: budgets.across_heads(n, floor, layer.heads),
        recent=recent,
        every=every,
        observe=recent,
    )
