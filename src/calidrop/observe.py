"""What a method may look at: recent queries with their exact log-sum-exp. No attention matrix leaves the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from calidrop import ops
from calidrop.attention import Queries, finite, logits
from calidrop.state import State
from calidrop.tokens import Tokens


@dataclass
class Observation(State):
    """Queries [B,Hq,W,D] with their log-sum-exp over everything they saw.

    lse: fp32 [B,Hq,W]. context: int64 [B], the real tokens of the sequence up to the end of its last prompt.
    start: int64 [B], the column of its first real token (the number of left pads). soft: the same of soft tokens behind
    the prompt, for methods that have some; it goes when other queries follow. mass: what `total_weights` says of the
    first columns of the cache, fp32 [B,H,columns], where the attention of a prompt has found it on the way. heard: the
    logits that attention left of one query, of some of what it asked: `ops.Heard`. beside: of every other layer that
    asks the same tokens, its last query [B,Hq,1,D]; what such layers ask ranks no tokens.
    """

    queries: Queries
    lse: Float[Tensor, "B Hq W"]
    context: Int[Tensor, " B"]
    start: Int[Tensor, " B"]
    soft: Observation | None = None
    mass: Float[Tensor, "B H N"] | None = None
    heard: ops.Heard | None = None
    beside: Sequence[Queries] = ()

    @property
    def prompt(self) -> bool:
        """Whether the queries (their last one) are of a prompt, not of generated tokens."""
        return self.queries.prompt

    @property
    def length(self) -> Int[Tensor, " B"]:
        """The real tokens of the sequence so far, generated ones included."""
        return self.queries.pos.amax(1).long() + 1 - self.start

    def index(self, t: Tokens) -> Int[Tensor, "B H N"]:
        """Where each token is in its own sequence, counted without pads."""
        return t.pos - self.start[:, None, None]

    def weights(self, t: Tokens, group: str = "mean") -> Float[Tensor, "B H W N"]:
        """True softmax weights on the tokens; `group` says what is taken of those of a kv head's query heads, their
        "mean" or "max". Pads weigh 0."""
        if len(self.queries) == 1:
            return ops.weights(self.queries, self.lse, t, group)[:, :, None]
        p = self.head_weights(t)
        return p.mean(2) if group == "mean" else p.amax(2)

    def head_weights(self, t: Tokens) -> Float[Tensor, "B H G W N"]:
        """`weights` of every query head."""
        s = logits(self.queries, t.k, t.pos)
        return torch.exp(s - finite(self.lse).view(*s.shape[:4], 1))

    def mean_weights(self, t: Tokens, group: str = "mean") -> Float[Tensor, "B H N"]:
        """`weights` averaged over the observed queries that are not pads."""
        if group == "mean":
            return self.total_weights(t) / self._real()
        return self.mean(self.weights(t, group))

    def mean(self, x: Float[Tensor, "B H W N"]) -> Float[Tensor, "B H N"]:
        """Over the observed queries; those that are pads must have 0."""
        return x.sum(2) / self._real()

    def _real(self) -> Tensor:
        return (self.queries.pos >= 0).sum(-1).clamp(min=1)[:, None, None]

    def total_weights(self, t: Tokens) -> Float[Tensor, "B H N"]:
        """`weights` summed over the queries: the column sums of an attention matrix that is never held."""
        if self.mass is not None:
            return self.mass.gather(2, t.pos.clamp(min=0).long()).masked_fill(~t.valid, 0.0)
        if t.logits is not None:
            return self.weights(t)[:, :, 0]
        return ops.mass(self.queries, self.lse, t)

    def slice(self, start: int, stop: int) -> Observation:
        if start == 0 and stop >= len(self.queries):
            return self
        return self._of(self.queries.slice(start, stop), self.lse[:, :, start:stop])

    def last(self, n: int) -> Observation:
        width = len(self.queries)
        return self.slice(max(0, width - n), width)

    def then(self, new: Observation, width: int) -> Observation:
        """This followed by `new`, cut to the last `width` queries."""
        if len(new.queries) >= width:
            return new.last(width).copied()
        old = self.last(width - len(new.queries))
        q = torch.cat([old.queries.q, new.queries.q], 2)
        pos = torch.cat([old.queries.pos, new.queries.pos], 1)
        lse = torch.cat([old.lse, new.lse], 2)
        return new._of(replace(new.queries, q=q, pos=pos, visible=None, window=None), lse)

    def copied(self) -> Observation:
        """Holds only its own queries (a slice would keep the whole prompt's alive), and nothing of their step."""
        qs = self.queries
        own = replace(qs, q=qs.q.clone(), pos=qs.pos.clone(), visible=None, window=None)
        return self._of(own, self.lse.clone())

    def _of(self, queries: Queries, lse: Tensor) -> Observation:
        """Of other queries: without what is known of all of its own."""
        return replace(self, queries=queries, lse=lse, mass=None, heard=None)

    def take_rows(self, rows: Tensor) -> None:
        qs = self.queries
        rows = rows.to(qs.q.device)
        self.queries = replace(qs, q=qs.q[rows], pos=qs.pos[rows])
        self.lse, self.context, self.start = self.lse[rows], self.context[rows], self.start[rows]
        self.beside = [replace(x, q=x.q[rows], pos=x.pos[rows]) for x in self.beside]
        if self.soft is not None:
            self.soft.take_rows(rows)
