"""Evicted tokens as a few weighted-mean tokens per kv head, each with a logit bias."""

from __future__ import annotations

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import finite, logits
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.state import State
from calidrop.tokens import Tokens

ROUNDS = 8  # of k-means; the assignment hardly moves afterwards


class Summary(State):
    """`size` tokens per kv head: k, v [B,H,c,D] fp32, bias [B,H,c] fp32, -inf where there are fewer."""

    def __init__(self, size: int):
        self.size = size
        self.k: Tensor | None = None
        self.v: Tensor | None = None
        self.bias: Tensor | None = None

    def add(self, t: Tokens, obs: Observation) -> None:
        """Fold tokens in. What was summarised before takes part as biased tokens, so nothing is asked of the host."""
        k, v = t.k.float(), t.v.float()
        bias = torch.zeros_like(t.pos, dtype=torch.float32).masked_fill(~t.valid, float("-inf"))
        if self.k is not None and self.v is not None and self.bias is not None:
            k, v = torch.cat([self.k, k], 2), torch.cat([self.v, v], 2)
            bias = torch.cat([self.bias, bias], 2)
        self.k, self.v, self.bias = summarise(k, v, bias, obs, self.size)

    def piece(self) -> Piece:
        assert self.k is not None and self.v is not None and self.bias is not None
        return ops.piece(Tokens(self.k, self.v, slots(self.bias)), self.bias.nan_to_num(neginf=0.0))


def slots(bias: Tensor) -> Tensor:
    """Positions that every query sees: 0, or -1 where there is no token."""
    return torch.zeros_like(bias, dtype=torch.int32).masked_fill(bias == float("-inf"), -1)


def summarise(k: Tensor, v: Tensor, bias: Tensor, obs: Observation, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """k, v: [B,H,N,D] fp32; bias [B,H,N], -inf for empty. -> means [B,H,c,D], [B,H,c,D], bias [B,H,c].

    Clusters of keys; each is the mean of its members, weighted by the attention the observed queries pay them, with the
    bias that makes its logit the log-sum-exp of its members on average over those queries."""
    member = cluster(k, bias > float("-inf"), size)  # [B,H,N,c] 0/1
    qs = obs.queries
    s = logits(qs, k, slots(bias), bias.nan_to_num(neginf=0.0))  # [B,H,G,W,N]
    lse = s.logsumexp(-1, keepdim=True)
    p = torch.exp(s - finite(lse))
    seen = (qs.pos >= 0)[:, None, None, :, None].float()
    count = seen.sum((2, 3)) * s.shape[2]  # [B,1,1]
    weight = (p * seen).sum((2, 3)) / count.clamp(min=1)  # [B,H,N]
    share = member * weight[..., None]
    mass = share.sum(2)  # [B,H,c]
    mean = (share / mass.clamp(min=1e-30)[:, :, None]).transpose(-1, -2)
    mean_k, mean_v = mean @ k, mean @ v
    lse_c = (p @ member[:, :, None]).clamp(min=1e-30).log() + finite(lse)  # [B,H,G,W,c]
    own = logits(qs, mean_k, torch.zeros_like(mass, dtype=torch.int32))
    gap = torch.where(seen > 0, lse_c - own, torch.zeros_like(own)).sum((2, 3)) / count.clamp(min=1)
    return mean_k, mean_v, gap.masked_fill(mass <= 0, float("-inf"))


def cluster(x: Tensor, valid: Tensor, size: int) -> Tensor:
    """k-means with evenly spaced first centres (so it is the same in any batch). x: [B,H,N,D] -> 0/1 [B,H,N,size]."""
    B, H, N, D = x.shape
    total = valid.sum(-1, keepdim=True)  # [B,H,1]
    rank = valid.cumsum(-1) - 1
    want = (torch.arange(size, device=x.device) * total) // size  # [B,H,size] ranks
    first = torch.searchsorted(rank.contiguous(), want.contiguous()).clamp(max=N - 1)
    centre = x.gather(2, first[..., None].expand(B, H, size, D))
    member = x.new_zeros(B, H, N, size)
    for _ in range(ROUNDS):
        distance = centre.square().sum(-1)[:, :, None] - 2 * x @ centre.transpose(-1, -2)
        member = torch.zeros_like(distance).scatter_(-1, distance.argmin(-1, keepdim=True), 1.0) * valid[..., None]
        n = member.sum(2)[..., None]
        centre = torch.where(n > 0, member.transpose(-1, -2) @ x / n.clamp(min=1), centre)
    return member
