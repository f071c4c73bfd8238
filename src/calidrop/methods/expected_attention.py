import torch
from torch import Tensor

from calidrop import budgets
from calidrop.observe import Observation
from calidrop.parts import Evictor, Layer, check_budget, check_every, check_int, method
from calidrop.rope import Rope
from calidrop.store import Score, real
from calidrop.tokens import Tokens


class ExpectedAttention(Score):
    """Moments of un-rotated queries, and from them the expected exp(logit) of future queries. decoding: of those of
    generated tokens too, though holding moments costs D * D numbers per query head."""

    def __init__(self, rope: Rope, future: int, sinks: int, decoding: bool):
        self.rope, self.future, self.sinks, self.decoding = rope, future, sinks, decoding
        self.flushed()

    def flushed(self) -> None:
        self.count: Tensor | None = None  # [B]
        self.sum = self.outer = self.count  # [B,Hq,D], [B,Hq,D,D]

    def observe(self, step: Observation) -> None:
        if not (step.prompt or self.decoding):
            return
        qs = step.queries
        index = qs.pos - step.start[:, None]
        used = ((qs.pos >= 0) & (index >= self.sinks)).float()  # [B,T]
        q = self.rope.rotate(qs.q, -qs.pos[:, None]) * used[:, None, :, None]
        new = used.sum(1), q.sum(2), q.transpose(-1, -2) @ q
        old = (self.count, self.sum, self.outer)
        self.count, self.sum, self.outer = (n if o is None else o + n for o, n in zip(old, new, strict=True))

    def __call__(self, t: Tokens, obs: Observation) -> Tensor:
        assert self.count is not None and self.sum is not None and self.outer is not None
        B, H, N, D = t.k.shape
        n = self.count.clamp(min=1)[:, None, None]
        mean = self.sum / n
        cov = self.outer / n[..., None] - mean[..., None] * mean[..., None, :]
        cos, sin = (x[:, None] for x in self.rope.mean_turn(obs.queries.pos[:, -1] + 1, self.future))
        mean = self.rope.turn(mean, cos, sin)
        half = self.rope.turn(cov, cos[:, :, None], sin[:, :, None])  # rotates the columns, then the rows
        cov = self.rope.turn(half.transpose(-1, -2), cos[:, :, None], sin[:, :, None])
        k, scale = t.k.float()[:, :, None], obs.queries.scale  # [B,H,1,N,D]
        mean, cov = mean.view(B, H, -1, D), cov.view(B, H, -1, D, D)
        logit = (k @ mean[..., None])[..., 0] * scale + ((k @ cov) * k).sum(-1) * (scale * scale / 2)  # [B,H,G,N]
        first = obs.index(t) < self.sinks
        logit = real(logit.transpose(1, 2).flatten(0, 1), (t.valid & ~first).repeat_interleave(logit.shape[2], 0))
        weights = torch.softmax(logit.view(B, -1, H, N), -1).nan_to_num(0.0).mean(1)
        return (weights * t.v.float().norm(dim=-1)).masked_fill(first, float("inf"))


@method("Expected Attention, arXiv 2510.00636")
def expected_attention(
    budget: int | float, recent: int = 0, future: int = 512, sinks: int = 4, every: int | None = None
) -> Evictor:
    """Expected Attention (Devoto et al., arXiv 2510.00636, eq. 5-7): the attention a Gaussian of future queries pays,
    times the norm of the value.

    future: over how many coming positions the rotation is averaged. sinks: first tokens, always kept and left out of
    the moments. The moments are those of the prompt's queries; with `every`, of all since the last compression, which
    holds 4 * D * D bytes per query head between two of them.
    """
    check_budget("expected_attention", budget, recent)
    check_int("expected_attention: future", future, 1)
    check_int("expected_attention: sinks", sinks, 0)
    check_every("expected_attention", every)
    if isinstance(budget, int) and sinks + recent > budget:
        raise ValueError(f"expected_attention: sinks + recent must fit in budget, got {sinks} + {recent} > {budget}")

    def score(layer: Layer) -> Score:
        if layer.rope is None:
            model = layer.model_type or "this model"
            raise ValueError(f"expected_attention does not know how {model} rotates keys in layer {layer.index}")
        return ExpectedAttention(layer.rope, future, sinks, every is not None)

    amount = budgets.amount(budget, recent)
    return Evictor(score=score, amount=amount, recent=recent, every=every, rotations=True)
