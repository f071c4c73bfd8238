"""The leaf every encoded format is built on: tokens in units of `group`, encoded when a unit is full."""

from __future__ import annotations

import copy
from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries
from calidrop.holding import Holding, positions
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.state import Ragged
from calidrop.store import Exact, Store, count, unseen, with_positions
from calidrop.tokens import Tokens

CODES = (
    *("k", "v", "k_scale", "k_zero", "v_scale", "v_zero"),
    *("order", "k16", "k4", "k4_scale", "k4_zero"),  # of keys at several widths
)


def whole_units(waiting: Exact, t: Tokens, size: int, obs: Observation) -> tuple[Tokens, Tensor]:
    """What waits, followed by `t`, cut into units of `size` tokens, each (row, head) from its first token on; what does
    not fill one waits (again). -> tokens [B,H,units*size], bool [B,H,units]: which units there are."""
    t = Tokens.cat([*waiting.open(), t])
    t = t.select(t.valid)
    whole = t.valid.sum(-1) // size  # [B,H] full units
    most = int(whole.max())
    late = torch.arange(len(t), device=t.pos.device) >= (whole * size)[..., None]
    if bool((late & t.valid).any()):
        waiting.add(t.select(late), obs)
    t.pos, t.dense = t.pos.masked_fill(late, -1), False
    return t.slice(0, most * size), torch.arange(most, device=t.pos.device) < whole[..., None]


class Coded(Store):
    """Encoded tokens, packed per (row, head).

    A unit of `group` tokens is filled per (row, head) from its first token on, so pads and unequal heads do not disturb
    it; tokens that do not fill one yet wait, exact. `held` has a column per encoded tensor, [B,H,units,...]. A format
    says how a unit is encoded and decoded, may look at what comes first (`prepare`), may keep some tokens exact
    (`beside`), and may work in a basis of its own (`turn`, `unturn`, `restore`), so that a rotation is applied to a few
    queries and outputs instead of all keys and values.
    """

    def __init__(self, group: int = 1):
        self.group = group
        self.waiting = Exact()
        self.beside: list[Exact] = []
        self.held: Ragged | None = None
        self.dtype = torch.float32

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """k, v: [B,H,units,group,D] in the model's dtype -> columns [B,H,units,...], named neither pos nor stat:..."""

    def encoded(self, units: Tensor) -> None:
        """Called after `encode`. units: bool [B,H,units], those that are real."""

    @abstractmethod
    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse, as nearly as the format can, in the format's own basis: k, v [B,H,units,group,D]."""

    @abstractmethod
    def format(self) -> str:
        """A few words for `describe`."""

    def arrive(self, t: Tokens) -> None:
        """Called with whatever is added, none at all included, in every process that shares the layer's heads."""

    def prepare(self, t: Tokens, obs: Observation) -> Tokens:
        """Called with the tokens of full units before they are encoded; may take some out by emptying their slots."""
        return t

    def turn(self, q: Tensor) -> Tensor:
        """q: [B,Hq,T,D] -> what has the same product with a decoded key as q has with the key."""
        return q

    def unturn(self, o: Tensor) -> Tensor:
        """o: [B,Hq,T,Dv], a mean of decoded values -> the same mean of values."""
        return o

    def restore(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Decoded keys and values out of the format's basis."""
        return k, v

    def add(self, t: Tokens, obs: Observation) -> None:
        self.dtype = t.k.dtype
        self.arrive(t)
        t, full = whole_units(self.waiting, t, self.group, obs)
        most = full.shape[2]
        if most == 0:
            return
        t = self.prepare(t, obs)
        units = {n: x.unflatten(2, (most, self.group)) for n, x in t.columns().items()}
        data = self.encode(units.pop("k"), units.pop("v")) | units
        self.encoded(full)
        self.held = Ragged(data, full) if self.held is None else self.held.append(data, full)

    def _units(self) -> Tokens | None:
        """What is encoded, in the format's basis."""
        if self.held is None or self.held.longest == 0:
            return None
        data, full = self.held.padded()
        k, v = self.decode(data)
        kept = {n: x for n, x in data.items() if n == "pos" or n.startswith("stat:")}
        columns = {"k": k.to(self.dtype), "v": v.to(self.dtype), **kept}
        valid = None if full is None else full[..., None].expand(*full.shape, self.group).flatten(2)
        t = Tokens.from_columns({n: x.flatten(2, 3) for n, x in columns.items()}, valid)
        t.dense = t.dense and not self.beside  # those that are kept beside left empty slots
        return t

    def _restored(self) -> list[Tokens]:
        t = self._units()
        if t is None:
            return []
        k, v = self.restore(t.k.float(), t.v.float())
        return [Tokens(k.to(self.dtype), v.to(self.dtype), t.pos, t.stats, t.dense)]

    def _exact(self) -> list[Exact]:
        return [*self.beside, self.waiting]

    def layout(self, q: Tensor) -> dict[str, Any]:
        """What a kernel must know to read the codes: `kind`, `bits`, ... of `Piece`; empty where none can. q: the
        queries."""
        return {}

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        parts = [part for store in self._exact() for part in store.attend(qs)]
        if self.held is None or self.held.longest == 0:
            return parts
        return [*parts, self._piece(qs.q, bool(self.beside)) or self._answer(qs)]

    def lying(self, like: Tensor) -> list[Piece]:
        parts = [part for store in self._exact() for part in store.lying(like)]
        if self.held is None or self.held.longest == 0:
            return parts
        found = self._piece(like, True)
        return parts + ([found] if found else [with_positions(t) for t in self._restored()])

    def _piece(self, q: Tensor, positions: bool) -> Piece | None:
        """What is encoded, for a kernel; None where none can read it."""
        assert self.held is not None
        layout = self.layout(q)
        columns = (*CODES, "pos") if positions else CODES
        return Piece.held(self.held, columns, self._answer, group=self.group, **layout) if layout else None

    def _answer(self, qs: Queries) -> Partial:
        t = self._units()
        assert t is not None
        o, lse = ops.attend(replace(qs, q=self.turn(qs.q).to(qs.q.dtype)), t)
        return self.unturn(o), lse

    def tokens(self) -> list[Tokens]:
        return self._restored() + [t for store in self._exact() for t in store.tokens()]

    def holdings(self) -> list[Holding]:
        units = [Holding("coded", self.format(), positions(self.held))] if self.held is not None else []
        return units + [h for store in self._exact() for h in store.holdings()]

    def open(self) -> list[Tokens]:
        """Decoded: what is kept again is rounded again, on new units if tokens between were dropped."""
        out = self._restored() + [t for store in self._exact() for t in store.open()]
        self.held = None
        return out

    @property
    def unit(self) -> int:
        return self.group

    def leave(self) -> Ragged | None:
        held, self.held = self.held, None
        return held

    def reader(self, units: Ragged | None) -> Store:
        new = copy.copy(self)
        new.waiting, new.beside, new.held = Exact(), [Exact() for _ in self.beside], units
        return new

    def _told(self, heard: ops.Heard | None) -> list[Tokens]:
        """What is encoded, of `told`."""
        return unseen(self.held, heard, self.group) or self._restored()

    def told(self, heard: ops.Heard | None) -> list[Tokens]:
        return self._told(heard) + [t for store in self._exact() for t in store.told(heard)]

    def restat(self, fn: Callable[[Tokens], dict[str, Tensor]], heard: ops.Heard | None) -> None:
        for t in self._told(heard):
            assert self.held is not None
            columns = {f"stat:{n}": x.unflatten(2, (-1, self.group)) for n, x in fn(t).items()}
            self.held = self.held.replace(columns)
        for store in self._exact():
            store.restat(fn, heard)

    def describe(self) -> str:
        units = f"{count(self.held)} units of {self.group}" if self.group > 1 else count(self.held)
        exact = "".join(f", exact {count(store.held)}" for store in self._exact() if store.held is not None)
        return f"{self.format()}: {units}{exact}"
