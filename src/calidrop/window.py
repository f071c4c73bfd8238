"""The exact recent tokens of one layer, all heads alike: written in place at its end, cut at its front at a flush."""

from __future__ import annotations

import torch
from torch import Tensor

from calidrop.state import Buffer, State
from calidrop.tokens import Tokens


class Window(State):
    def __init__(self) -> None:
        self.k, self.v, self.pos = Buffer(), Buffer(), Buffer()
        self.stats: dict[str, Tensor] = {}
        self.dense = True

    def __len__(self) -> int:
        return self.pos.len

    def append(self, t: Tokens) -> None:
        self.k.append(t.k)
        self.v.append(t.v)
        self.pos.append(t.pos)
        self.dense = self.dense and t.dense
        self.stats = {n: torch.cat([s, s.new_zeros(t.pos.shape)], 2) for n, s in self.stats.items()}

    def tokens(self) -> Tokens:
        return Tokens(self.k.value, self.v.value, self.pos.value, self.stats, self.dense)

    def tail(self, n: int) -> Window:
        """A window of the last n columns, in memory of its own."""
        new = Window()
        if n and len(self):
            t = self.tokens().slice(max(0, len(self) - n))
            t.dense = self.dense or bool(t.valid.all())
            new.append(t)
            new.stats = {name: s.clone() for name, s in t.stats.items()}
        return new
