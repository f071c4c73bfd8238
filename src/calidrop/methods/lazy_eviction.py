import torch
from torch import Tensor

from calidrop import budgets
from calidrop.observe import Observation
from calidrop.parts import Evictor, check_budget, check_choice, check_int, check_number, method
from calidrop.store import Score
from calidrop.tokens import Tokens


class Recurrence(Score):
    """Per token, int32 [B,H,N]: `silent`, generated tokens since a query last attended to it (the paper's t - TS), and
    `longest`, the longest such silence that ended (MRI). Both begin at 0, when a token comes; prompts take no time."""

    tracks = True

    def __init__(self, alpha: float, birth: bool):
        self.alpha, self.birth = alpha, birth

    def stats(self, t: Tokens, step: Observation) -> dict[str, Tensor]:
        silent, longest = (t.stats[n] if n in t.stats else torch.zeros_like(t.pos) for n in ("silent", "longest"))
        T = 0 if step.prompt else len(step.queries)  # more than one where a generation is replayed
        for i in range(T):
            one = step if T == 1 else step.slice(i, i + 1)
            active = one.weights(t, "max")[:, :, 0] >= self.alpha
            if T == 1:  # all tokens are here by now
                silent = silent + 1
            else:
                at = one.queries.pos[:, None]
                here = (t.pos <= at) | (at < 0)  # a generated pad takes its time too
                active, silent = active & here, silent + here
            if not self.birth:  # the token of this step: attended to by itself, which is no recurrence
                silent = silent.masked_fill(t.pos == one.queries.pos[:, None], 0)
            ended = silent * active
            longest, silent = torch.maximum(longest, ended), silent - ended
        return {"silent": silent, "longest": longest}

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        silent, longest = t.stats["silent"].float(), t.stats["longest"].float()
        overdue = 2 * torch.sigmoid(-(1 + silent / (longest + 1e-5)))
        often = 2 * torch.sigmoid(-(longest - 1))
        return overdue + often * (longest > 0)


@method("LazyEviction, arXiv 2506.15969")
def lazy_eviction(budget: int | float, window: int = 64, alpha: float = 5e-4, birth: bool = True) -> Evictor:
    """LazyEviction (arXiv 2506.15969, sec. 4; score as in the official code): tokens that are due to be needed again.

    window: the last tokens that always stay, inside the budget, and how many are generated between two evictions; so a
    head holds budget + window - 1 at most, once the first eviction is over. alpha: the attention weight from which a
    token counts as active. birth: whether a new token's attention to itself counts, as in the official code; it gives
    tokens that are never looked at again a score that few recurring ones reach. Prompts are neither compressed nor
    counted as steps; their tokens may be evicted later, `window` generated tokens after them. 8 bytes per token and kv
    head.

    Deviations: per kv head, a token is active if any query head of the group is at alpha (the official code keeps keys
    and values per query head, and so gives up what GQA saves); counters are int32 (theirs are in the dtype of
    attention, which cannot count far); among equal scores the older stays (theirs: arbitrary; tokens that were never
    active all score 0).
    """
    check_int("lazy_eviction: window", window, 1)
    check_budget("lazy_eviction", budget, window, "window")
    check_number("lazy_eviction: alpha", alpha, 0.0, 1.0)
    check_choice("lazy_eviction: birth", birth, (True, False))
    return Evictor(
        score=lambda layer: Recurrence(alpha, birth),
        amount=budgets.amount(budget, window),
        recent=window,
        every=window,
        prompts=False,
    )
