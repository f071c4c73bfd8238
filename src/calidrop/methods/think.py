from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries
from calidrop.holding import Holding
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.parts import Layer, Shrink, check_number, method
from calidrop.state import Ragged, State
from calidrop.store import Score, Store
from calidrop.tokens import Tokens


class Channels(State):
    """The channels that stay, per (row, kv head): index int64 [B,H,D'], ascending, of `width`."""

    def __init__(self, score: Tensor, keep: int):
        """score: [B,H,D]"""
        self.width = score.shape[-1]
        self.index = score.topk(keep, -1).indices.sort(-1).values

    def cut(self, x: Tensor) -> Tensor:
        """x: [B,H,N,D] -> [B,H,N,D'] (heads may be query heads: each takes those of its kv head)."""
        return x.gather(3, self._rows(x))

    def spread(self, x: Tensor) -> Tensor:
        """The inverse, zero in the channels that were dropped."""
        return x.new_zeros(*x.shape[:3], self.width).scatter(3, self._rows(x), x)

    def where(self, heads: Tensor, other: Channels) -> Channels:
        """`other` in the marked (row, kv head), bool [B,H]."""
        new = copy.copy(self)
        new.index = torch.where(heads[..., None], other.index, self.index)
        return new

    def _rows(self, x: Tensor) -> Tensor:
        index = self.index.repeat_interleave(x.shape[1] // self.index.shape[1], 1)
        return index[:, :, None].expand(-1, -1, x.shape[2], -1)


class ThinKeys(Store):
    """Tokens without the channels that the observed queries make least of, in a store of their own."""

    def __init__(self, inner: Store, keep: int, values: int | None):
        self.inner, self.keep, self.values = inner, keep, values
        self.of_keys: Channels | None = None
        self.of_values: Channels | None = None
        self.missing: Tensor | None = None  # bool [B,H], heads that have had no token, where others had
        self.by = ""  # who answered last, where values have fewer channels too

    def add(self, t: Tokens, obs: Observation) -> None:
        if self.of_keys is None or self.missing is not None:
            self._choose(t, obs)
        assert self.of_keys is not None
        v = self.of_values.cut(t.v) if self.of_values else t.v
        self.inner.add(replace(t, k=self.of_keys.cut(t.k), v=v), obs)

    def _choose(self, t: Tokens, obs: Observation) -> None:
        B, H, _, D = t.k.shape
        qs = obs.queries
        q = (qs.q.float() * (qs.pos >= 0)[:, None, :, None]).reshape(B, H, -1, D)  # the group's queries together
        k = t.k.float() * t.valid[..., None]
        keys, values = Channels(q.square().sum(2) * k.square().sum(2), self.keep), None
        if self.values is not None:
            answers = obs.weights(t) @ (t.v.float() * t.valid[..., None])  # [B,H,W,Dv]
            values = Channels(answers.square().sum(2), self.values)
        came = t.valid.any(-1)  # each head has those of its own first tokens
        if self.missing is None or self.of_keys is None:
            self.of_keys, self.of_values, missing = keys, values, ~came
        else:
            new, missing = came & self.missing, self.missing & ~came
            self.of_keys = self.of_keys.where(new, keys)
            if self.of_values is not None and values is not None:
                self.of_values = self.of_values.where(new, values)
        self.missing = missing if bool(missing.any()) else None

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        if self.of_keys is None:
            return []
        cut = replace(qs, q=self.of_keys.cut(qs.q))
        parts = self.inner.attend(cut)
        if not parts:
            return []
        if self.of_values is None:
            return [self._leaf(p, self.of_keys, cut.q) if isinstance(p, Piece) else p for p in parts]
        backend = ops.pick(cut, parts)
        self.by = backend.name
        o, lse = backend.decode(cut, parts)
        return [(self.of_values.spread(o), lse)]

    @staticmethod
    def _leaf(piece: Piece, channels: Channels, q: Tensor) -> Piece:
        """One that is asked with fewer channels, along with all others. q: the queries [B,Hq,T,D'] of this call; those
        of `answer` may be others."""
        q = q if piece.q is None else piece.q  # which has them in a basis of its own
        return replace(piece, q=q, answer=lambda qs: piece.answer(replace(qs, q=channels.cut(qs.q))))

    def _whole(self, t: Tokens) -> Tokens:
        assert self.of_keys is not None
        if t.logits is not None:
            return t
        v = self.of_values.spread(t.v) if self.of_values else t.v
        return replace(t, k=self.of_keys.spread(t.k), v=v)

    def tokens(self) -> list[Tokens]:
        return [self._whole(t) for t in self.inner.tokens()]

    def holdings(self) -> list[Holding]:
        return [h.narrower(self._channels()) for h in self.inner.holdings()]

    def open(self) -> list[Tokens]:
        return [self._whole(t) for t in self.inner.open()]

    @property
    def unit(self) -> int:
        return self.inner.unit

    def leave(self) -> Ragged | None:
        return self.inner.leave()

    def reader(self, units: Ragged | None) -> Store:
        new = copy.copy(self)
        new.inner = self.inner.reader(units)
        return new

    @property
    def drops(self) -> bool:
        return self.inner.drops

    def told(self, heard: ops.Heard | None) -> list[Tokens]:
        return [self._whole(t) for t in self.inner.told(heard)]

    def restat(self, fn: Callable[[Tokens], dict[str, Tensor]], heard: ops.Heard | None) -> None:
        self.inner.restat(lambda t: fn(self._whole(t)), heard)

    def observe(self, step: Observation) -> None:
        self.inner.observe(step)

    def trackers(self) -> list[Score]:
        return self.inner.trackers()

    def describe(self) -> str:
        by = f" (answered by {self.by})" if "torch" in self.by else ""
        return f"{self._channels()}: {self.inner.describe()}{by}"

    def _channels(self) -> str:
        return f"{self.keep} channels of keys" + (f" and {self.values} of values" if self.values is not None else "")


@method("ThinK, arXiv 2407.21018")
def think(keep: float = 0.6, values: float = 1.0, recent: int = 32) -> Shrink:
    """ThinK (Xu et al., arXiv 2407.21018, sec. 3.2): the key channels that matter to the last queries of the prompt.

    keep: the fraction of key channels that stay, per kv head by |q_d| |k_d| summed over its query group; rounded up to
    an even number and to a 16th of the head. values: the same for value channels, by their part in the observed answers
    (the paper's appendix; 1.0 keeps all). recent: the last tokens that keep every channel, if no evictor decides that.
    Channels are chosen at the first compression of a head's tokens. Bytes per token and head, D channels:
    D (keep + values) elements.
    On SmolLM2 (64 channels a head) it costs more than dropping tokens worth the same bytes (LOG.md).
    """
    check_number("think: keep", keep, 0.0, 1.0)
    check_number("think: values", values, 0.0, 1.0)
    if keep == 0 or values == 0:
        raise ValueError(f"think: keep and values must be above 0, got keep={keep} and values={values}")

    def channels(layer: Layer, fraction: float) -> int:
        step = max(2, layer.head_dim // 16)
        return min(layer.head_dim, -(-max(1, round(fraction * layer.head_dim)) // step) * step)

    def make(layer: Layer, inner: Callable[[Layer], Store]) -> Store:
        k, v = channels(layer, keep), channels(layer, values)
        return ThinKeys(inner(replace(layer, head_dim=k, value_dim=v)), k, v if values < 1 else None)

    return Shrink(make, recent, 16, observe=32)
