"""What the last queries paid the blocks on the host, and what the next one is expected to pay them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop import ops
from calidrop.attention import finite
from calidrop.methods._predictor import REACH, SEEN, Expectation
from calidrop.observe import Observation
from calidrop.state import State
from calidrop.tokens import Tokens

NOTHING = 2.0**-24  # of a sum in fp32


class Rows(State):
    """history: fp32 [B,H,size,blocks], the newest row last; a row has the largest weight in every block, the mean over
    the query heads of a kv head. Blocks are those on the host, in order; zero where a batch row has fewer: there, bool
    [B,blocks], has those it has (None: all rows have all). expected: the next row, where the last step found it."""

    anew = frozenset({"_net"})

    def __init__(self, size: int, block: int, network: Callable[[torch.device], Expectation]):
        self.size, self.block, self.network = size, block, network
        self._net: Expectation | None = None
        self.history: Tensor | None = None
        self.peaks: Tensor | None = None  # [B,H,G,W,blocks+1]: largest logits, until their lse is known; one for none
        self.there: Tensor | None = None
        self.expected: Tensor | None = None
        self.moving = Moving()

    def begin(self, t: Tokens) -> None:
        if self.history is None:
            self.history = t.k.new_zeros(*t.k.shape[:2], self.size, 0, dtype=torch.float32)
            self._net = self.network(t.k.device)

    @property
    def net(self) -> Expectation:
        if self._net is None:
            assert self.history is not None
            self._net = self.network(self.history.device)
        return self._net

    def join(self, t: Tokens, full: Tensor, before: Tensor, obs: Observation) -> None:
        """Columns of new blocks: the spans marked in `full` (bool [B,H,spans]), behind the `before` [B] that are there.

        The last queries have attended all of these tokens, in the window or the prompt, so what they paid is exact."""
        assert self.history is not None
        last, per = obs.last(self.size), len(t) // full.shape[2] // self.block
        step = max(1, (1 << 14) // self.block) * self.block  # tokens weighed at once
        parts = [pooled_rows(last, t.slice(i, i + step), self.block) for i in range(0, len(t), step)]
        columns = newest(torch.cat(parts, -1), last.queries.pos >= 0, self.size)  # [B,H,size,new]
        blocks = (before + full[:, 0].sum(-1)) * per
        width = int(blocks.max())
        self.there = (
            None if bool((blocks == width).all()) else torch.arange(width, device=blocks.device) < blocks[:, None]
        )
        at = before[:, None] * per + torch.arange(columns.shape[-1], device=before.device)
        at = torch.where(full[:, 0].repeat_interleave(per, 1), at, width)  # what does not exist goes behind the end
        grown = F.pad(self.history, (0, width + 1 - self.history.shape[-1]))
        self.history = grown.scatter(3, at[:, None, None].expand_as(columns), columns)[..., :width].contiguous()
        self.moving.change(int(before.min()) * per)
        self.expected = None

    def take_rows(self, rows: Tensor) -> None:
        super().take_rows(rows)
        if self.there is None or self.history is None:
            return
        width = int(self.there.any(0).sum())  # the longest row may be gone
        self.history, self.there = self.history[..., :width].contiguous(), self.there[:, :width]
        self.there = None if bool(self.there.all()) else self.there.contiguous()
        self.moving.cut(width)

    # ---- the next row

    def peak(self, logits: Tensor, ids: Tensor) -> None:
        """logits: [B,H,G,W,n*span] of the spans `ids` [B,H,n] (-1: none), of queries whose lse is not known yet."""
        assert self.history is not None
        highest = pooled(logits, self.block)
        if self.peaks is None:
            self.peaks = highest.new_full((*highest.shape[:4], self.history.shape[3] + 1), float("-inf"))
        at = self._blocks(ids, highest.shape[4])[:, :, None, None].expand_as(highest)
        self.peaks = self.peaks.scatter(4, at, highest)

    def push_peaks(self, last: Observation) -> None:
        """Rows of queries that asked everything (`peak`)."""
        if self.peaks is None:  # nothing is on the host
            self.push(last, None, None)
        else:
            weights = torch.exp(self.peaks - finite(last.lse).view(*self.peaks.shape[:4], 1)).mean(2)
            self.peaks = None
            if not self._follow(last, weights[:, :, 0, :-1], None):
                self._append(weights[..., :-1], last)

    def push(self, last: Observation, weights: Tensor | None, ids: Tensor | None) -> None:
        """weights: [B,H,W,n] of the blocks of spans `ids` (-1: none), None for none at all; 0 for all other blocks."""
        assert self.history is not None
        if weights is not None and ids is not None and self._follow(last, weights[:, :, 0], ids):
            return
        B, H, _, blocks = self.history.shape
        rows = self.history.new_zeros(B, H, len(last.queries), blocks + 1)
        if weights is not None and ids is not None:
            at = self._blocks(ids, weights.shape[3])[:, :, None].expand_as(weights)
            rows = rows.scatter(3, at, weights)
        self._append(rows[..., :-1], last)

    def _blocks(self, ids: Tensor, n: int) -> Tensor:
        """[B,H,spans] -> [B,H,n], the columns of their blocks; the one behind the end for none."""
        assert self.history is not None
        per = n // ids.shape[2]
        if per == 1:
            return ids.masked_fill(ids < 0, self.history.shape[3])
        at = ids[..., None] * per + torch.arange(per, device=ids.device)
        return torch.where(ids[..., None] < 0, self.history.shape[3], at).flatten(2)

    def _follow(self, last: Observation, weights: Tensor, ids: Tensor | None) -> bool:
        """A row of one query, and what is expected behind it, where one call says both. -> whether it did.
        weights: [B,H,n]"""
        assert self.history is not None
        known = self.net.follows(self.history) and not self.moving.lacks(self.net, self.history)
        if not known or len(last.queries) > 1 or not bool((last.queries.pos >= 0).all()):
            return False
        assert self.moving.sum is not None
        found = self.net.follow(self.history, weights, ids, self._real(), self.moving.sum)
        self.history, self.moving.sum, self.expected = found
        return True

    def _append(self, rows: Tensor, last: Observation) -> None:
        assert self.history is not None
        real, new = last.queries.pos >= 0, rows.shape[2]
        if new == 1 and bool(real.all()):
            self.history = torch.cat([self.history[:, :, 1:], rows], 2)
            return
        real = F.pad(real, (self.size, 0), value=True)
        self.history = newest(torch.cat([self.history, rows], 2), real, self.size)
        if new > 1:
            self.moving.forget()

    def next_row(self) -> Tensor:
        """[B,H,blocks], the expected next row, once for every row that came."""
        assert self.history is not None
        if self.expected is not None:
            row, self.expected = self.expected, None
            return row
        B, H, _, blocks = self.history.shape
        if blocks == 0:
            return self.history.new_zeros(B, H, 0)
        return self.moving.next_row(self.net, self.history, self._real())

    def _real(self) -> Tensor | None:
        """bool [B*H,blocks], the blocks there are; None: all."""
        assert self.history is not None
        return None if self.there is None else self.there.repeat_interleave(self.history.shape[1], 0)


class Moving(State):
    """`next_row` of a history that moves by one row from call to call, for the work of three rows (six where the oldest
    count) instead of all: two convolutions see two rows to either side, so only rows next to the borders change, one
    becomes an inner row and one ceases to be. New blocks change the columns beside them.

    sum: fp64 [B,H,blocks], of the inner rows; oldest [B,H,blocks], the next of them to go; changed: the first column
    that neither knows yet."""

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.oldest: Tensor | None = None
        self.changed = 0

    def forget(self) -> None:
        """The history changed otherwise."""
        self.sum = self.oldest = None
        self.changed = 0

    def change(self, first: int) -> None:
        """The history changed in all columns from `first` on."""
        self.changed = min(self.changed, first)

    def cut(self, width: int) -> None:
        """No row has more than the first `width` columns any more."""
        self.sum, self.oldest = (None if x is None else x[..., :width].contiguous() for x in (self.sum, self.oldest))
        self.changed = min(self.changed, width)

    def lacks(self, net: Expectation, history: Tensor) -> bool:
        """Whether more than `sum` must be known to move by a row."""
        rows, blocks = history.shape[2:]
        short = rows < 2 * SEEN or net.decay ** (rows - SEEN) > NOTHING
        return short or self.sum is None or self.oldest is not None or self.changed < blocks

    def next_row(self, net: Expectation, history: Tensor, real: Tensor | None) -> Tensor:
        """history: [B,H,R,blocks]; real: bool [B*H,blocks]. -> [B,H,blocks]"""
        shape, (rows, blocks) = history.shape, history.shape[2:]
        x = history.flatten(0, 1)
        if rows < 2 * SEEN:
            return net.next_row(x, real).view(*shape[:2], -1)
        decay, new = net.decay, net.edge(x[:, -SEEN:], real, newest=True).view(*shape[:2], -1, blocks)
        old = None
        if decay ** (rows - SEEN) > NOTHING:
            old = net.edge(x[:, :SEEN], real, newest=False).view(*shape[:2], -1, blocks)
        if self.sum is not None:
            inner = self.sum if self.oldest is None else self.sum - decay ** (rows - 1 - REACH) * self.oldest
            if inner.shape[-1] < blocks:
                inner = F.pad(inner, (0, blocks - inner.shape[-1]))
            self.sum = torch.add(decay * inner, new[:, :, 0], alpha=decay**REACH)
        if self.changed < blocks:
            self.sum = self._of_columns(net, history, real)
            self.changed = blocks
        assert self.sum is not None
        total = self.sum
        for age in range(REACH):
            total = torch.add(total, new[:, :, -1 - age], alpha=decay**age)
        if old is not None:
            self.oldest = old[:, :, -1].clone()
            for row in range(REACH):
                total = torch.add(total, old[:, :, row], alpha=decay ** (rows - 1 - row))
        return net.finish((total / sum(decay**age for age in range(rows))).float())

    def _of_columns(self, net: Expectation, history: Tensor, real: Tensor | None) -> Tensor:
        """`sum`, with what changed (and what sees that) asked anew."""
        first = max(0, self.changed - REACH)
        seen = max(0, first - REACH)
        terms = net.terms(history[..., seen:].flatten(0, 1), None if real is None else real[:, seen:])
        inner = terms.view(*history.shape[:3], -1)[:, :, REACH:-REACH, first - seen :]
        share = net.shares(history.shape[2], history.device)[REACH:-REACH]
        found = torch.einsum("bhtn,t->bhn", inner.double(), share.double())
        return found if self.sum is None else torch.cat([self.sum[..., :first], found], -1)


def pooled(weights: Tensor, block: int) -> Tensor:
    """[...,blocks*block] -> [...,blocks]"""
    return weights.unflatten(-1, (-1, block)).amax(-1)


def pooled_rows(obs: Observation, t: Tokens, block: int) -> Tensor:
    """What the observed queries pay each block of `t`, the mean over the query heads of a kv head: [B,H,W,blocks]."""
    if len(obs.queries) == 1:
        return ops.weights(obs.queries, obs.lse, t, block=block)[:, :, None]
    return pooled(obs.head_weights(t), block).mean(2)


def newest(rows: Tensor, real: Tensor, n: int) -> Tensor:
    """rows: [B,H,T,blocks], oldest first; real: bool [B,T]. -> the last n that are real, [B,H,n,blocks], zeros in front
    where there are fewer."""
    if rows.shape[2] < n:
        short = n - rows.shape[2]
        rows, real = F.pad(rows, (0, 0, short, 0)), F.pad(real, (short, 0))
    if not bool(real[:, -n:].all()):
        order = real.to(torch.int8).argsort(dim=-1, stable=True)  # those that are not first
        rows = (rows * real[:, None, :, None]).gather(2, order[:, None, :, None].expand_as(rows))
    return rows[:, :, -n:].contiguous()
