"""The leaf every encoded format is built on: tokens in units of `group`, encoded when a unit is full."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor

from calidrop import ops
from calidrop.attention import Partial, Queries
from calidrop.observe import Observation
from calidrop.state import Ragged
from calidrop.store import Exact, Store, count
from calidrop.tokens import Tokens


class Coded(Store):
    """Encoded tokens, packed per (row, head).

    A unit of `group` tokens is filled per (row, head) from its first token on, so pads and unequal heads do not disturb
    it; tokens that do not fill one yet wait, exact. `held` has a column per encoded tensor, [B,H,units,...]. A format
    says how a unit is encoded and decoded, and may look at the observation before its first one (`prepare`).
    """

    def __init__(self, group: int = 1):
        self.group = group
        self.waiting = Exact()
        self.held: Ragged | None = None
        self.dtype = torch.float32

    @abstractmethod
    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        """k, v: [B,H,units,group,D] in the model's dtype -> columns [B,H,units,...], named neither pos nor stat:..."""

    @abstractmethod
    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        """The inverse, as nearly as the format can."""

    @abstractmethod
    def format(self) -> str:
        """A few words for `describe`."""

    def prepare(self, t: Tokens, obs: Observation) -> None:
        """Called before tokens are encoded, with those that are about to be."""

    def add(self, t: Tokens, obs: Observation) -> None:
        self.dtype = t.k.dtype
        t = Tokens.cat([*self.waiting.open(), t])
        t = t.select(t.valid)
        whole = t.valid.sum(-1) // self.group  # [B,H] full units
        most = int(whole.max())
        column = torch.arange(len(t), device=t.pos.device)
        late = t.select(t.valid & (column >= (whole * self.group)[..., None]))
        if len(late):
            self.waiting.add(late, obs)
        if most == 0:
            return
        full = torch.arange(most, device=t.pos.device) < whole[..., None]
        t = t.slice(0, most * self.group)
        self.prepare(t, obs)
        units = {n: x.unflatten(2, (most, self.group)) for n, x in t.columns().items()}
        data = self.encode(units.pop("k"), units.pop("v")) | units
        self.held = Ragged(data, full) if self.held is None else self.held.append(data, full)

    def decoded(self) -> list[Tokens]:
        if self.held is None or self.held.longest == 0:
            return []
        data, full = self.held.padded()
        k, v = self.decode(data)
        kept = {n: x for n, x in data.items() if n == "pos" or n.startswith("stat:")}
        columns = {"k": k.to(self.dtype), "v": v.to(self.dtype), **kept}
        valid = None if full is None else full[..., None].expand(*full.shape, self.group).flatten(2)
        return [Tokens.from_columns({n: x.flatten(2, 3) for n, x in columns.items()}, valid)]

    def attend(self, qs: Queries) -> list[Partial]:
        return [ops.attend(qs, t) for t in self.tokens()]

    def tokens(self) -> list[Tokens]:
        return self.decoded() + self.waiting.tokens()

    def open(self) -> list[Tokens]:
        """Decoded: what is kept again is rounded again, on new units if tokens between were dropped."""
        out = self.decoded() + self.waiting.open()
        self.held = None
        return out

    def restat(self, fn: Callable[[Tokens], dict[str, Tensor]]) -> None:
        for t in self.decoded():
            assert self.held is not None
            columns = {f"stat:{n}": x.unflatten(2, (-1, self.group)) for n, x in fn(t).items()}
            self.held = self.held.replace(columns)
        self.waiting.restat(fn)

    def describe(self) -> str:
        units = f"{count(self.held)} units of {self.group}" if self.group > 1 else count(self.held)
        waiting = f", exact {count(self.waiting.held)}" if self.group > 1 else ""
        return f"{self.format()} {units}{waiting}"
