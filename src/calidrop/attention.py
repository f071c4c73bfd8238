"""Attention over one set of keys as a partial (o, lse), and the exact merge of partials.

This is the specification in plain torch: every kernel in `ops` is tested against `attend`, and the four properties of
every store are stated with it. Scores, lse and merges are fp32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Partial = tuple[Tensor, Tensor]
"""o [B,Hq,T,Dv], normalised within its own set of keys; lse fp32 [B,Hq,T], -inf for an empty set (then o is 0)."""

Visible = Callable[[Tensor, Tensor], Tensor]
"""(query positions [B,T], key positions [B,H,N]) -> bool [B,1 or H,T,N]: the model's mask at stored positions."""

SCORE_BYTES = 64 << 20  # the largest block of scores held at once


@dataclass(frozen=True)
class Queries:
    """q: [B,Hq,T,D], rotated. pos: [B,T], -1 for a left pad. scale multiplies logits, softcap (if any) bends them.
    visible replaces the causal rule `key position <= query position` when the model's mask is another one. window: that
    it is this rule within so many columns, the query's own included (a sliding window). prompt: whether they are a
    prompt's, though there may be only one. asker: which one asks of the layers that share keys and values."""

    q: Float[Tensor, "B Hq T D"]
    pos: Int[Tensor, "B T"]
    scale: float
    softcap: float | None = None
    visible: Visible | None = None
    window: int | None = None
    prompt: bool = False
    asker: int = 0

    def __len__(self) -> int:
        return self.q.shape[2]

    def slice(self, start: int, stop: int) -> Queries:
        q, pos = self.q[:, :, start:stop], self.pos[:, start:stop]
        return Queries(q, pos, self.scale, self.softcap, self.visible, self.window, self.prompt, self.asker)

    def last(self, n: int) -> Queries:
        return self.slice(max(0, len(self) - n), len(self))

    def alone(self) -> Queries:
        """The last of them, which keeps none of the others alive."""
        return replace(self, q=self.q[:, :, -1:].clone(), pos=self.pos[:, -1:].clone(), visible=None, window=None)


def grouped(q: Float[Tensor, "B Hq T D"], kv_heads: int) -> Float[Tensor, "B H GT D"]:
    """All queries that share a kv head in one matrix, so that its keys are read once for the group."""
    B, Hq, T, D = q.shape
    return q.reshape(B, kv_heads, Hq // kv_heads * T, D)


def logits(
    qs: Queries, k: Float[Tensor, "B H N D"], pos: Int[Tensor, "B H N"], bias: Tensor | None = None
) -> Float[Tensor, "B H G T N"]:
    """fp32; -inf where the slot is empty or the query may not see it. bias: [B,H,N], added to the logits."""
    B, Hq, T, _ = qs.q.shape
    H = k.shape[1]
    s = grouped(qs.q.float(), H) @ k.float().transpose(-1, -2) * qs.scale
    s = s.view(B, H, Hq // H, T, k.shape[2])
    if qs.softcap is not None:
        s = qs.softcap * torch.tanh(s / qs.softcap)
    if bias is not None:
        s = s + bias[:, :, None, None]
    return s.masked_fill(~visible(qs, pos)[:, :, None], float("-inf"))


def visible(qs: Queries, pos: Int[Tensor, "B H N"]) -> Bool[Tensor, "B H T N"]:
    """Which stored tokens each query may see."""
    there = (pos >= 0)[:, :, None]
    if qs.visible is not None:
        return there & (qs.pos >= 0)[:, None, :, None] & qs.visible(qs.pos, pos)
    return there & (pos[:, :, None] <= qs.pos[:, None, :, None])  # a pad sees none, as its position is -1


def attend(
    qs: Queries,
    k: Float[Tensor, "B H N D"],
    v: Float[Tensor, "B H N Dv"],
    pos: Int[Tensor, "B H N"],
    bias: Tensor | None = None,
) -> Partial:
    """The oracle. Works through the queries in blocks, so memory stays bounded for any T and N."""
    B, Hq, T, _ = qs.q.shape
    block = max(1, SCORE_BYTES // max(1, 4 * B * Hq * k.shape[2]))
    if block < T:
        parts = [attend(qs.slice(i, min(i + block, T)), k, v, pos, bias) for i in range(0, T, block)]
        return torch.cat([o for o, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    v = values(k, v)
    s = logits(qs, k, pos, bias)
    lse = s.logsumexp(-1)
    w = torch.exp(s - finite(lse)[..., None])
    o = (w.flatten(2, 3) @ v.float()).view(B, Hq, T, v.shape[-1])
    return o, lse.view(B, Hq, T)


def values(k: Tensor, v: Tensor) -> Tensor:
    """v, or the keys where values have no channels of their own (`Tokens`)."""
    return v if v.shape[-1] else k


def finite(lse: Tensor) -> Tensor:
    """lse with -inf (no visible key) replaced, so that exp(-inf - finite) is 0 and not NaN."""
    return lse.masked_fill(lse == float("-inf"), 0.0)


def merge(parts: list[Partial]) -> Partial:
    """Exactly the attention over the union of disjoint sets. -> o fp32, lse fp32."""
    if len(parts) == 1:
        return parts[0][0].float(), parts[0][1]
    lse = torch.stack([part[1] for part in parts])
    total = lse.logsumexp(0)
    w = torch.exp(lse - finite(total))
    o = sum(w[i][..., None] * part[0].float() for i, part in enumerate(parts))
    assert isinstance(o, Tensor)
    return o, total


def with_sink(qs: Queries, found: Partial, sink: Tensor | None) -> Partial:
    """An answer joined with the sink, a token without a value; o in the dtype of the queries."""
    o, lse = found
    if sink is not None:
        logit = sink.float()[:, None]
        o, lse = o * torch.sigmoid(lse - logit)[..., None], torch.logaddexp(lse, logit)
    return o.to(qs.q.dtype), lse
