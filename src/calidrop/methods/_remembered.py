"""What evicted tokens said to earlier queries, and what is on its way of what they say to new ones."""

from __future__ import annotations

import torch
from torch import Tensor

from calidrop.attention import Queries, finite, logits
from calidrop.offload import Arrival
from calidrop.state import Host, State
from calidrop.tokens import Tokens


class Answer(State):
    """What a set of tokens said to one query per query head: o [...,D], lse [...], and mean_k [...,D], the slope of lse
    in the query divided by the scale (the attention-weighted mean key; bent where logits are soft-capped). All fp32."""

    def __init__(self, o: Tensor, lse: Tensor, mean_k: Tensor):
        self.o, self.lse, self.mean_k = o, lse, mean_k

    @staticmethod
    def of(qs: Queries, t: Tokens) -> Answer:
        """One query per head: qs.q [B,Hq,1,D]. Exact."""
        s = logits(qs, t.k, t.pos)  # [B,H,G,1,N]
        lse = s.logsumexp(-1, keepdim=True)
        p = torch.exp(s - finite(lse))
        slope = p if qs.softcap is None else p * (1 - (s.masked_fill(p == 0, 0.0) / qs.softcap).square())
        B, Hq = qs.q.shape[:2]
        o, mean_k = (w[..., 0, :] @ x.float() for w, x in ((p, t.values), (slope, t.k)))
        return Answer(o.view(B, Hq, -1), lse.view(B, Hq), mean_k.view(B, Hq, -1))

    def joined(self, other: Answer) -> Answer:
        """The answer of the union of both sets to the same query. Exact."""
        lse = torch.logaddexp(self.lse, other.lse)
        a, b = (torch.exp(x.lse - finite(lse))[..., None] for x in (self, other))
        return Answer(a * self.o + b * other.o, lse, a * self.mean_k + b * other.mean_k)


class Coming(Host):
    """A new answer to some heads, perhaps still on its way. asking: all heads' queries [B,Hq,1,D]; asked: bool [B,Hq],
    those it is for; pairs: int64 [P], which (row, kv head) they are of; answer: [P,G,...]."""

    def __init__(self, asking: Queries, asked: Tensor, pairs: Tensor, answer: Answer):
        self.asking, self.asked, self.pairs, self.answer = asking, asked, pairs, answer
        self.arrival = Arrival()


class Memory(State):
    """Of the queries of one layer. The device holds q and the answer to it: q, o and mean_k [B,Hq,D] and lse [B,Hq].

    alike: whether o and mean_k are one tensor, as where values are the keys (`Tokens`) and no softcap bends logits.
    counted: int64 [B,2], query heads that were asked again, and that could have been. wanted: bool [B,Hq], those that
    want an answer to the queries `asking` [B,Hq,1,D] later on; `coming`: one that was asked for."""

    def __init__(self) -> None:
        self.q: Tensor | None = None
        self.answer: Answer | None = None
        self.alike = False
        self.counted: Tensor | None = None
        self.wanted: Tensor | None = None
        self.asking: Queries | None = None
        self.coming: Coming | None = None

    def anchor(self, last: Queries) -> None:
        """From now on this is the query [B,Hq,1,D] that answers are to."""
        self.wanted = self.coming = None
        self.q = last.q[:, :, 0].to(torch.float32, copy=True)  # a view would keep the whole window alive

    def remember(self, answer: Answer) -> None:
        self.answer = Answer(answer.o, answer.lse, answer.o) if self.alike else answer

    def join(self, t: Tokens, last: Queries) -> None:
        """Tokens that were evicted while decoding: what they say to the old query joins the old answer. last: the
        newest query, for heads that had lost nothing so far."""
        assert self.q is not None and self.answer is not None
        first = self.answer.lse == float("-inf")
        self.q = torch.where(first[..., None], last.q[:, :, 0].float(), self.q)
        at = Queries(self.q[:, :, None].to(t.k.dtype), last.pos, last.scale, last.softcap)
        self.remember(self.answer.joined(Answer.of(at, t)))

    def moved(self, qs: Queries, order: int) -> Tensor:
        """[B,Hq,T], the lse of what is remembered for these queries."""
        assert self.q is not None and self.answer is not None
        lse = self.answer.lse[..., None]
        if order == 1:
            drift = (qs.q.float() - self.q[:, :, None]) @ self.answer.mean_k[..., None]  # 0 where just refreshed
            lse = lse + qs.scale * drift[..., 0]
        return lse

    def count(self, n: Tensor) -> None:
        self.counted = n if self.counted is None else self.counted + n

    def place(self, new: Coming, kv_heads: int, value_dim: int) -> None:
        """Remember a new answer."""
        assert self.q is not None
        B, Hq, D = self.q.shape
        old = self.answer or Answer(
            self.q.new_zeros(B, Hq, value_dim, dtype=torch.float32),
            self.q.new_full((B, Hq), float("-inf"), dtype=torch.float32),
            self.q.new_zeros(B, Hq, D, dtype=torch.float32),
        )

        def put(before: Tensor, after: Tensor) -> Tensor:
            spread = before.reshape(-1, Hq // kv_heads, *before.shape[2:]).index_copy(0, new.pairs, after)
            return torch.where(new.asked.view(B, Hq, *[1] * (before.dim() - 2)), spread.view_as(before), before)

        answer = new.answer
        self.remember(Answer(put(old.o, answer.o), put(old.lse, answer.lse), put(old.mean_k, answer.mean_k)))
        self.q = torch.where(new.asked[..., None], new.asking.q[:, :, 0].float(), self.q)

    def take_rows(self, rows: Tensor) -> None:
        self.coming = None  # whose rows are the old ones
        super().take_rows(rows)
        if self.answer is not None:
            self.remember(self.answer)
