"""What every part of a cache has in common: it holds tensors, and they can be counted, forked and reordered.

Three rules make that possible:

* every tensor attribute is batch-first, unless the class overrides `take_rows`;
* a part is reachable in one way only, else its rows would be taken twice, and a fork would have two of it;
* tensors are replaced, never changed in place. The one exception is `Buffer`, which writes behind its own length.
  So a fork (a copy of the objects that shares the tensors) is a snapshot, and costs no memory. Of an object with
  buffers and its forks, only one may go on growing: they would write to the same place. (What a recorded step replaced
  is copied to where it was, `steady.py`: no snapshots there.)
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from calidrop import huge


class State:
    """Base of everything a cache is made of.

    counts: names of attributes that say how often something happened and that no step depends on.
    anew: names of those that are found again where they are None, so that no file need have them."""

    counts: ClassVar[frozenset[str]] = frozenset()
    anew: ClassVar[frozenset[str]] = frozenset()

    def fork(self) -> State:
        """A snapshot that shares tensors with this object; later changes to either are not seen by the other."""
        new = object.__new__(type(self))  # what `copy.copy` does takes several times as long
        vars(new).update({name: _fork(value) for name, value in vars(self).items()})
        return new

    def take_rows(self, rows: Tensor) -> None:
        """Reorder, repeat or drop batch rows: row i becomes the old row `rows[i]` (int64 [B'])."""
        for name, value in vars(self).items():
            setattr(self, name, map_tensors(value, lambda x: x.index_select(0, rows.to(x.device)), rows))


class Host(State):
    """A State whose tensors live in host memory on purpose: counted as host bytes, not as device bytes."""


class Shared(State):
    """Tensors that are no part of a sequence and the same objects in every layer, like a small network."""

    def fork(self) -> State:
        return self

    def __deepcopy__(self, memo: dict) -> State:
        return self

    def take_rows(self, rows: Tensor) -> None:
        pass


class Note:
    """What follows from where some tensors lie, and what it follows from: good for as long as they are the same
    tensors. It keeps none of them alive, and it may be handed on with any of them."""

    def __init__(self) -> None:
        self._of: list[weakref.ref[Tensor]] = []
        self._asked: Any = None
        self._said: Any = None

    def get(self, of: Sequence[Tensor], asked: Any) -> Any:
        """What was put down of these tensors for the same question; None if nothing was."""
        if self._asked != asked or len(self._of) != len(of):
            return None
        for ref, x in zip(self._of, of, strict=True):
            if ref() is not x:
                return None
        return self._said

    def put(self, of: Sequence[Tensor], asked: Any, said: Any) -> None:
        self._of, self._asked, self._said = [weakref.ref(x) for x in of], asked, said

    def __reduce__(self) -> tuple[type[Note], tuple[()]]:
        return Note, ()  # elsewhere nothing is known


def _fork(value: Any) -> Any:
    if isinstance(value, State):
        return value.fork()
    if isinstance(value, dict):
        return {key: _fork(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_fork(item) for item in value]
    return value


def map_tensors(value: Any, fn: Callable[[Tensor], Tensor], rows: Tensor) -> Any:
    """Apply `fn` to the tensors inside `value`; nested States reorder themselves with `rows`."""
    if isinstance(value, State):
        value.take_rows(rows)
        return value
    if isinstance(value, Tensor):
        return fn(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        of = {f.name: map_tensors(getattr(value, f.name), fn, rows) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **of)
    if isinstance(value, dict):
        return {key: map_tensors(item, fn, rows) for key, item in value.items()}
    if isinstance(value, list):
        return [map_tensors(item, fn, rows) for item in value]
    return value


def tensors(value: Any, host: bool = False) -> Iterator[Tensor]:
    """Every tensor held by `value` on the device, or (host=True) in its `Host` parts."""
    if isinstance(value, Tensor):
        if not host:
            yield value
    elif isinstance(value, Host):
        if host:
            yield from (t for item in vars(value).values() for t in tensors(item))
    elif isinstance(value, State) or (dataclasses.is_dataclass(value) and not isinstance(value, type)):
        yield from (t for item in vars(value).values() for t in tensors(item, host))
    elif isinstance(value, dict):
        yield from (t for item in value.values() for t in tensors(item, host))
    elif isinstance(value, list | tuple):
        yield from (t for item in value for t in tensors(item, host))


def swap(value: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """The value with every tensor on the device replaced by `fn` of it, always in the same order."""
    if isinstance(value, Tensor):
        return fn(value)
    if isinstance(value, Host | Shared):
        return value
    if isinstance(value, State):
        for name, item in vars(value).items():
            setattr(value, name, swap(item, fn))
        return value
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.replace(
            value, **{f.name: swap(getattr(value, f.name), fn) for f in dataclasses.fields(value)}
        )
    if isinstance(value, dict):
        return {name: swap(item, fn) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(swap(item, fn) for item in value)
    return value


def outline(value: Any) -> Any:
    """All that a recorded step takes for granted: shapes, and what is kept in Python, but for what only counts."""
    if isinstance(value, Tensor):
        return value.shape, value.stride(), value.dtype
    if isinstance(value, Host | Shared | Note):
        return None
    if isinstance(value, State):
        return [type(value), *((n, outline(x)) for n, x in vars(value).items() if n not in value.counts)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return [type(value), *(outline(getattr(value, f.name)) for f in dataclasses.fields(value))]
    if isinstance(value, dict):
        return [(name, outline(item)) for name, item in value.items()]
    if isinstance(value, list | tuple):
        return [outline(item) for item in value]
    return value if isinstance(value, int | float | str | None) else id(value)


def held_bytes(value: Any, host: bool = False) -> int:
    """Bytes of storage kept alive by `value`: whole storages, each counted once, whatever part of them is in use."""
    storages = {}
    for t in tensors(value, host):
        storage = t.untyped_storage()
        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


class Buffer(State):
    """A tensor that grows along dim 2, written in place behind its length. It grows by a 32nd of itself (16 to 512
    slots), so little is idle and appending one by one copies each element about 32 times at most."""

    counts = frozenset({"len"})

    def __init__(self) -> None:
        self.data: Tensor | None = None
        self.len = 0

    def append(self, x: Tensor) -> None:
        """x: [B,H,T,...]"""
        at = self.len
        self.grow(x)[:, :, at : self.len] = x

    def grow(self, x: Tensor) -> Tensor:
        """Lets x [B,H,T,...] in, which the caller writes behind what there is. -> the memory [B,H,room,...]."""
        need = self.len + x.shape[2]
        if self.data is None or need > self.data.shape[2]:
            room = _roomy(need)
            if self.data is not None and _roomy(self.data.shape[2] + 1) >= need:
                room = _roomy(self.data.shape[2] + 1)  # what there would be, had they come one by one
            grown = huge.empty(x, (*x.shape[:2], room, *x.shape[3:]))
            if self.data is not None:
                grown[:, :, : self.len] = self.data[:, :, : self.len]
            self.data = grown
        elif self.data.is_inference() and not torch.is_inference_mode_enabled():
            self.data = self.data.clone()  # torch lets nobody write to the other
        self.len = need
        return self.data

    def put(self, x: Tensor, slot: Tensor) -> None:
        """x: [B,H,1,...], to a slot (int64 [1], on the device) of the memory there is, which the caller counts."""
        assert self.data is not None
        self.data.index_copy_(2, slot, x)

    @property
    def value(self) -> Tensor:
        """[B,H,len,...], a view."""
        assert self.data is not None
        return self.data[:, :, : self.len]


def _roomy(need: int) -> int:
    return need + min(max(need // 32, 16), 512)


class Ragged(State):
    """Columns whose length differs from one (row, head) to the next, at the memory of what is really there.

    data: name -> [B,H,n,...] while all lengths are equal, flat [sum(lens),...] in (row, head) order once they differ.
    lens: int64 [B,H]. note: for who reads them where they lie.
    """

    def __init__(self, data: dict[str, Tensor], keep: Tensor, own: bool = False):
        """data: name -> [B,H,N,...]; keep: bool [B,H,N]. Keeps the marked slots, in order. own: the data is nobody
        else's and need not be copied if all of it stays."""
        self.note = Note()
        self.lens = keep.sum(-1)
        self.longest = int(self.lens.max()) if keep.numel() else 0
        self.uniform = bool((self.lens == self.longest).all())
        if not self.uniform:
            self.data = {name: huge.marked(x, keep) for name, x in data.items()}
        elif self.longest == keep.shape[2]:
            # else a copy: the caller's tensors are often views of something much larger, which would stay alive
            self.data = data if own else {name: huge.copy(x) for name, x in data.items()}
        else:
            order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[..., : self.longest]
            self.data = {name: gather(x, order) for name, x in data.items()}

    def padded(self) -> tuple[dict[str, Tensor], Tensor | None]:
        """Rectangular columns [B,H,longest,...] and which slots are real (None: all). No copy while uniform."""
        if self.uniform:
            return self.data, None
        B, H = self.lens.shape
        starts = (self.lens.flatten().cumsum(0) - self.lens.flatten()).view(B, H, 1)
        steps = torch.arange(self.longest, device=self.lens.device)
        valid = steps < self.lens[..., None]
        index = (starts + steps).masked_fill(~valid, 0)
        return {name: x[index] for name, x in self.data.items()}, valid

    def only(self, *names: str) -> Ragged:
        """With these columns alone. Shares their memory."""
        return self._but(data={name: self.data[name] for name in names})

    def _but(self, **attributes: Any) -> Ragged:
        """This one with other attributes: what `copy.copy` does takes five times as long."""
        new = object.__new__(Ragged)
        vars(new).update(vars(self), **attributes)
        return new

    def append(self, data: dict[str, Tensor], keep: Tensor) -> Ragged:
        """This content followed by the marked slots of `data`, as a new Ragged. Columns must have the same names."""
        old, valid = self.padded()
        if valid is None:
            valid = keep.new_ones(*self.lens.shape, self.longest)
        both = {name: huge.cat([x, data[name]], 2) for name, x in old.items()}
        return Ragged(both, torch.cat([valid, keep], 2), own=True)

    def replace(self, columns: dict[str, Tensor]) -> Ragged:
        """With new or changed columns, given [B,H,longest,...] as `padded` lays them out."""
        _, valid = self.padded()
        packed = {n: x if valid is None else huge.marked(x, valid) for n, x in columns.items()}
        return self._but(data={**self.data, **packed})

    def of_all(self, data: dict[str, Tensor]) -> Ragged:
        """Other columns [B,H,n,...] in its place, of all heads alike. Keeps them as they are."""
        n = next(iter(data.values())).shape[2]
        return self._but(data=data, uniform=True, longest=n, lens=torch.full_like(self.lens, n))

    def opened(self) -> Ragged:
        """With the items of a slot as slots of their own: [B,H,n,m,...] -> [B,H,n*m,...]. Shares its memory."""
        at = 2 if self.uniform else 0
        per = next(iter(self.data.values())).shape[at + 1]
        data = {name: x.flatten(at, at + 1) for name, x in self.data.items()}
        return self._but(data=data, lens=self.lens * per, longest=self.longest * per)

    def take_rows(self, rows: Tensor) -> None:
        data, valid = self.padded()
        rows = rows.to(self.lens.device)
        if valid is None:
            valid = torch.ones(*self.lens.shape, self.longest, dtype=torch.bool, device=self.lens.device)
        vars(self).update(vars(Ragged({name: x[rows] for name, x in data.items()}, valid[rows])))


def gather(x: Tensor, index: Tensor) -> Tensor:
    """x: [B,H,N,...], index: int64 [B,H,n] -> [B,H,n,...]."""
    tail = x.shape[3:]
    return huge.gather(x, 2, index.view(*index.shape, *[1] * len(tail)).expand(*index.shape, *tail))
