from calidrop.methods.g_kv import GlobalScore, check, growing
from calidrop.methods.snapkv import check_window
from calidrop.parts import Evictor, method


@method("R-KV, arXiv 2505.24133")
def r_kv(
    budget: int | float = 1024,
    every: int | None = 128,
    recent: int = 8,
    mix: float = 0.1,
    kernel: int = 7,
    pairs: bool = False,
    least: int = 0,
) -> Evictor:
    """R-KV (Cai et al., arXiv 2505.24133, sec. 3): attention of the last queries less the redundancy of keys.

    Attention is the softmax of the largest logit of the query group, over the tokens that may go, mean over the last
    `recent` queries, the largest of `kernel` neighbours. mix: its weight against redundancy. The rest as in `g_kv`,
    without history: nothing is stored per token.

    Deviations: tokens are counted from the end of the prompt, not from its start (in the code, of the first sample).
    Redundancy is among the tokens that may go, not the window; of a key with no similar one no link is left out (in the
    code the one to the first key is, which favours it). What is kept depends on the length: both terms are softmaxes.
    """
    check("r_kv", budget, every, recent, least, mix, pairs)
    check_window("r_kv", budget, recent, kernel, every)
    amount = growing(budget, recent, least)
    return Evictor(
        score=lambda layer: GlobalScore(amount, None, 0.0, mix, kernel, pairs, rkv=True),
        amount=amount,
        growing=True,
        recent=recent,
        every=every,
        observe=recent,
    )
