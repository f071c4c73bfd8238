"""The exact recent tokens of one layer, all heads alike: written in place at its end, cut at its front at a flush.

While steps are recorded (`steady.py`) a window is fixed: all of its room is answered for, empty slots included, and a
token's column, a number on the device, says which slot it takes, so that a step does the same whatever its length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.state import Buffer, Note, State
from calidrop.tokens import Tokens


class Window(State):
    def __init__(self) -> None:
        self.k, self.v, self.pos = Buffer(), Buffer(), Buffer()
        self.stats: dict[str, Tensor] = {}
        self.dense = True
        self.before: Tensor | None = None  # int64 [1]: the columns in front of the first, while it is fixed
        self.note = Note()  # of its memory

    def __len__(self) -> int:
        return self.pos.len

    @property
    def room(self) -> int:
        """Columns there is memory for."""
        return 0 if self.pos.data is None else self.pos.data.shape[2]

    def append(self, t: Tokens) -> None:
        if self.before is not None:
            slot = self._slot(t)
            self.k.put(t.k, slot)
            self.v.put(t.v, slot)
            self.pos.put(t.pos, slot)
            self.written(t)
            return
        at = len(self)
        for room, x in zip(self.grow(t), (t.k, t.v, t.pos), strict=True):
            room[:, :, at : len(self)] = x.detach()  # no later step learns through them

    def _slot(self, t: Tokens) -> Tensor:
        assert self.before is not None
        return t.pos[0, 0] - self.before

    def count(self, tokens: int = 1) -> None:
        """So many more tokens (or less) are there, of those in its memory."""
        for buffer in (self.k, self.v, self.pos):
            buffer.len += tokens

    def written(self, t: Tokens) -> None:
        """A token [B,H,1] was put into the memory of a fixed window."""
        self.count()
        if self.stats:  # a score may have counted in the slot while it was empty
            slot = self._slot(t)
            self.stats = {n: s.index_fill(2, slot, 0) for n, s in self.stats.items()}

    def grow(self, t: Tokens) -> tuple[Tensor, Tensor, Tensor]:
        """Lets tokens in, whose keys, values and positions the caller writes behind what there is. -> the memory of
        all, [B,H,room,...]."""
        room = self.k.grow(t.k), self.v.grow(t.v), self.pos.grow(t.pos)
        self.dense = self.dense and t.dense
        if self.stats:
            self.stats = {n: F.pad(s, (0, t.pos.shape[2])) for n, s in self.stats.items()}
        return room

    def tokens(self) -> Tokens:
        if self.before is not None:
            k, v, pos = (x.data for x in (self.k, self.v, self.pos))
            assert k is not None and v is not None and pos is not None
            return Tokens(k, v, pos, self.stats)
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

    def fixed(self, room: int, seen: int) -> Window:
        """The same tokens in memory for `room` columns. seen: all columns so far, of which these are the last."""
        t, n = self.tokens(), len(self)
        new = Window()
        new.dense, new.before = self.dense, torch.full((1,), seen - n, device=t.pos.device)
        for buffer, x, empty in ((new.k, t.k, 0.0), (new.v, t.v, 0.0), (new.pos, t.pos, -1)):
            buffer.data, buffer.len = x.new_full((*x.shape[:2], room, *x.shape[3:]), empty), n
            buffer.data[:, :, :n] = x
        new.stats = {name: torch.cat([s, s.new_zeros(*s.shape[:2], room - n)], 2) for name, s in t.stats.items()}
        return new

    def loose(self) -> Window:
        """A window that grows again, in the same memory."""
        new = Window()
        new.k, new.v, new.pos, new.dense = self.k, self.v, self.pos, self.dense
        new.stats = {name: s[:, :, : len(self)] for name, s in self.stats.items()}
        return new
