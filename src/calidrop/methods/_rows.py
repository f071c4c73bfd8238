"""What the last queries paid the blocks on the host, and what the next one is expected to pay them."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.attention import finite
from calidrop.methods._predictor import Expectation
from calidrop.observe import Observation
from calidrop.state import State
from calidrop.tokens import Tokens


class Rows(State):
    """history: fp32 [B,H,size,blocks], the newest row last; a row has the largest weight in every block, the mean over
    the query heads of a kv head. Blocks are those on the host, in order; zero where a batch row has fewer."""

    def __init__(self, size: int, block: int, network: Callable[[torch.device], Expectation]):
        self.size, self.block, self.network = size, block, network
        self.net: Expectation | None = None
        self.history: Tensor | None = None
        self.peaks: Tensor | None = None  # [B,H,G,W,blocks+1]: largest logits, until their lse is known; one for none
        self.moving = Moving()

    def begin(self, t: Tokens) -> None:
        if self.history is None:
            self.history = t.k.new_zeros(*t.k.shape[:2], self.size, 0, dtype=torch.float32)
            self.net = self.network(t.k.device)

    def shape(self, span: int) -> tuple[int, int, int]:
        """B, H, spans"""
        assert self.history is not None
        B, H, _, blocks = self.history.shape
        return B, H, blocks * self.block // span

    def join(self, t: Tokens, full: Tensor, before: Tensor, obs: Observation) -> None:
        """Columns of new blocks: the spans marked in `full` (bool [B,H,spans]), behind the `before` [B] that are there.

        The last queries have attended all of these tokens, in the window or the prompt, so what they paid is exact."""
        assert self.history is not None
        last, per = obs.last(self.size), len(t) // full.shape[2] // self.block
        step = max(1, (1 << 14) // self.block) * self.block  # tokens weighed at once
        parts = [pooled_rows(last, t.slice(i, i + step), self.block) for i in range(0, len(t), step)]
        columns = newest(torch.cat(parts, -1), last.queries.pos >= 0, self.size)  # [B,H,size,new]
        width = int((before + full[:, 0].sum(-1)).max()) * per
        at = before[:, None] * per + torch.arange(columns.shape[-1], device=before.device)
        at = torch.where(full[:, 0].repeat_interleave(per, 1), at, width)  # what does not exist goes behind the end
        grown = F.pad(self.history, (0, width + 1 - self.history.shape[-1]))
        self.history = grown.scatter(3, at[:, None, None].expand_as(columns), columns)[..., :width].contiguous()
        self.moving.forget()

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
            self._append(weights[..., :-1], last)

    def push(self, last: Observation, weights: Tensor | None, ids: Tensor | None) -> None:
        """weights: [B,H,W,n] of the blocks of spans `ids` (-1: none), None for none at all; 0 for all other blocks."""
        assert self.history is not None
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
        at = ids[..., None] * per + torch.arange(per, device=ids.device)
        return torch.where(ids[..., None] < 0, self.history.shape[3], at).flatten(2)

    def _append(self, rows: Tensor, last: Observation) -> None:
        assert self.history is not None
        real = torch.ones(len(rows), self.size, dtype=torch.bool, device=rows.device)
        real = torch.cat([real, last.queries.pos >= 0], 1)
        self.history = newest(torch.cat([self.history, rows], 2), real, self.size)
        if len(last.queries) > 1:
            self.moving.forget()

    def next_row(self, there: Tensor) -> Tensor:
        """there: bool [B,spans], which are on the host. -> [B,H,blocks], the expected next row."""
        assert self.history is not None and self.net is not None
        B, H, _, blocks = self.history.shape
        real = None
        if blocks == 0:
            return self.history.new_zeros(B, H, 0)
        if not bool(there.all()):
            real = there.repeat_interleave(blocks // there.shape[1], 1).repeat_interleave(H, 0)
        return self.moving.next_row(self.net, self.history, real)


class Moving(State):
    """`next_row` of a history that moves by one row from call to call, for the work of ten rows instead of
    all: two convolutions see two rows to either side, so only rows next to the borders change, one becomes an inner row
    and one ceases to be. sum: fp64 [B,H,blocks], of the inner rows; oldest [B,H,blocks], the next of them to go."""

    SLAB = 5  # rows at a border: two that feel it, the inner one beside them, and what these see

    def __init__(self) -> None:
        self.sum: Tensor | None = None
        self.oldest: Tensor | None = None

    def forget(self) -> None:
        """The history changed in another way."""
        self.sum = self.oldest = None

    def next_row(self, net: Expectation, history: Tensor, real: Tensor | None) -> Tensor:
        """history: [B,H,R,blocks]; real: bool [B*H,blocks]. -> [B,H,blocks]"""
        shape, rows = history.shape, history.shape[2]
        share = net.shares(rows, history.device)
        x = history.flatten(0, 1)
        if rows < 2 * self.SLAB:
            return net.next_row(x, real).view(*shape[:2], -1)
        if self.sum is None or self.oldest is None:
            terms = net.terms(x, real).view(shape)
            first, last = terms[:, :, : self.SLAB], terms[:, :, -self.SLAB :]
            self.sum = torch.einsum("bhtn,t->bhn", terms[:, :, 2:-2].double(), share[2:-2].double())
        else:
            both = torch.cat([x[:, : self.SLAB], x[:, -self.SLAB :]])
            terms = net.terms(both, None if real is None else torch.cat([real, real]))
            first, last = terms.view(2, *shape[:2], self.SLAB, -1)
            self.sum = net.decay * (self.sum - share[2] * self.oldest) + share[-3] * last[:, :, 2]
        self.oldest = first[:, :, 2].clone()
        borders = torch.cat([first[:, :, :2], last[:, :, -2:]], 2), torch.cat([share[:2], share[-2:]])
        total = self.sum + torch.einsum("bhtn,t->bhn", *borders)
        return net.finish((total / share.sum()).float())


def pooled(weights: Tensor, block: int) -> Tensor:
    """[...,blocks*block] -> [...,blocks]"""
    return weights.unflatten(-1, (-1, block)).amax(-1)


def pooled_rows(obs: Observation, t: Tokens, block: int) -> Tensor:
    """What the observed queries pay each block of `t`, the mean over the query heads of a kv head: [B,H,W,blocks]."""
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
