from calidrop import budgets
from calidrop.methods.snapkv import WindowAttention, check_window
from calidrop.parts import Evictor, Layer, check_number, method
from calidrop.store import Budget


@method("PyramidKV, arXiv 2406.02069")
def pyramidkv(
    budget: int | float, recent: int = 32, kernel: int = 5, beta: float = 20, every: int | None = None
) -> Evictor:
    """PyramidKV (Cai et al., arXiv 2406.02069, sec. 3.2): SnapKV's scores with budgets that shrink from bottom to top.

    budget: the mean over layers; beta: the top layer gets 1/beta of it, the bottom layer what makes the mean hold.
    Layers differ at every budget (the reference code falls back to equal budgets when the smallest would be below the
    window, which is nearly always). Only compressed layers count where a model mixes attention kinds.
    """
    check_window("pyramidkv", budget, recent, kernel, every)
    check_number("pyramidkv: beta", beta, 1.0)

    def keep(layer: Layer, mean: budgets.Amount) -> Budget:
        return budgets.top_k(budgets.pyramid(mean, layer.index, layer.layers, float(beta), recent))

    return Evictor(
        score=lambda layer: WindowAttention(kernel),
        amount=budgets.amount(budget, recent),
        keep=keep,
        recent=recent,
        every=every,
        observe=recent,
    )
