"""What a layer keeps in host memory: columns per (row, head), appended to and read back whole, by head, or by index.

`calidrop` asks all evicted tokens of a head again, `attention_predictor` fetches the blocks it expects to matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from calidrop.holding import positions
from calidrop.state import Host, Ragged, State, tensors

CHUNK_BYTES = 16 << 20  # what one fetch brings to the device at once

Columns = dict[str, Tensor]


@dataclass
class Chunk:
    """A rectangular piece of a log, on the device: columns [B,H,n,...], which slots are real (None: all), and the place
    of its first slot in the list of each (row, head), int64 [B,H]."""

    data: Columns
    valid: Tensor | None
    first: Tensor

    @property
    def keep(self) -> Tensor:
        x = next(iter(self.data.values()))
        return x.new_ones(x.shape[:3], dtype=torch.bool) if self.valid is None else self.valid


@cache
def _copies(device: torch.device) -> torch.cuda.Stream:
    """The stream on which a device is sent what it may need next."""
    return torch.cuda.Stream(device)


class HostLog(Host):
    """An append-only log of named columns on the host; its (row, head) lists may differ in length. `segments` stay few:
    two of similar size are joined, so a slot is copied O(log N) times however often decoding appends. Beside a GPU they
    are in pinned memory.
    """

    def __init__(self) -> None:
        self.segments: list[Ragged] = []
        self.device = torch.device("cpu")

    def append(self, data: Columns, keep: Tensor) -> None:
        """data: name -> [B,H,N,...] on the device; keep: bool [B,H,N]. Takes the marked slots, in order."""
        self.device = keep.device
        self.segments.append(Ragged({n: x.to("cpu") for n, x in data.items()}, keep.to("cpu")))
        while len(self.segments) > 1 and self.segments[-2].longest <= 2 * self.segments[-1].longest:
            last = self.segments.pop()
            data, valid = last.padded()
            if valid is None:
                valid = torch.ones(*last.lens.shape, last.longest, dtype=torch.bool, device="cpu")
            self.segments[-1] = self.segments[-1].append(data, valid)
        self._pin(self.segments[-1])

    def take_rows(self, rows: Tensor) -> None:
        super().take_rows(rows)
        for s in self.segments:
            self._pin(s)

    def _pin(self, s: Ragged) -> None:
        if self.device.type == "cuda":
            s.data = {n: x.pin_memory() for n, x in s.data.items()}

    @property
    def lens(self) -> Tensor:
        """int64 [B,H], how much each list holds; on the host."""
        return torch.stack([s.lens for s in self.segments]).sum(0)

    def positions(self) -> Tensor:
        """int [B,H,N], the column "pos" of everything, -1 where a list has less; on the host."""
        return torch.cat([positions(s) for s in self.segments], 2)

    def chunks(self, whole: bool = False) -> Iterator[Chunk]:
        """Everything, in pieces of about CHUNK_BYTES, or `whole` segments at once."""
        before = 0
        for s in self.segments:
            if s.longest:
                data, valid = s.padded()
                slot = sum(x.nbytes for x in data.values()) / s.longest
                step = s.longest if whole else max(1, int(CHUNK_BYTES / max(1, slot)))
                for i in range(0, s.longest, step):
                    piece = {n: self._to_device(x[:, :, i : i + step]) for n, x in data.items()}
                    there = None if valid is None else valid[:, :, i : i + step].to(self.device)
                    yield Chunk(piece, there, (s.lens * 0 + before + i).to(self.device))
            before = before + s.lens

    def fetch(self, asked: Tensor) -> Iterator[Chunk]:
        """Chunks of the lists of the (row, head) pairs marked in `asked` (bool [B,H]).

        A chunk has the pairs as its batch, in `nonzero` order, and one head: [P,1,n,...]."""
        pairs = asked.flatten().nonzero().flatten().cpu()
        for s in self.segments:
            slot = len(pairs) * sum(_width(s, x) for x in s.data.values())
            step = max(1, CHUNK_BYTES // max(1, slot))
            longest = int(s.lens.flatten()[pairs].max())
            for start in range(0, longest, step):
                yield self._read(s, pairs, start, min(start + step, longest))

    def flat(self, *names: str) -> list[tuple[Tensor, ...]]:
        """Everything where it lies: of each segment the columns [slots,...], one (row, head) behind the other, and how
        many slots each has, int64 [B,H]."""
        return [(*(s.data[n].flatten(0, 2) if s.uniform else s.data[n] for n in names), s.lens) for s in self.segments]

    def lists(self, pairs: Tensor, *names: str) -> list[tuple[Tensor, ...]]:
        """The lists of some (row, head) pairs (int64 [P], on the host) where they lie: of each segment the columns
        [slots,...], and where each list begins and how many slots it has, int64 [P]."""
        found = []
        for s, (*columns, lens) in zip(self.segments, self.flat(*names), strict=True):
            found.append((*columns, _starts(s).flatten()[pairs], lens.flatten()[pairs]))
        return found

    def _read(self, s: Ragged, pairs: Tensor, start: int, stop: int) -> Chunk:
        there, first = None, torch.full((len(pairs), 1), start, device=self.device)
        if self.device.type == "cuda":
            return Chunk(*self._sent(s, pairs, start, stop), first)
        if s.uniform:
            cut = {n: x.flatten(0, 1)[:, start:stop].index_select(0, pairs) for n, x in s.data.items()}
        else:
            at = torch.arange(start, stop, device="cpu")
            there = at < s.lens.flatten()[pairs, None]
            index = (_starts(s).flatten()[pairs, None] + at).masked_fill(~there, 0)
            cut = {n: x[index] for n, x in s.data.items()}
            there = there[:, None].to(self.device)
        return Chunk({n: self._to_device(x[:, None]) for n, x in cut.items()}, there, first)

    def _sent(self, s: Ragged, pairs: Tensor, start: int, stop: int) -> tuple[Columns, Tensor | None]:
        """Straight out of pinned memory, a copy per list and column: gathering them first would cost as much again."""
        begin, many = _starts(s).flatten(), s.lens.flatten()
        spans = [(int(begin[p]), min(stop, int(many[p]))) for p in pairs]
        out = {}
        for n, x in s.data.items():
            flat = x.flatten(0, 2) if s.uniform else x
            out[n] = torch.zeros(len(pairs), 1, stop - start, *flat.shape[1:], dtype=x.dtype, device=self.device)
            for to, (first, end) in zip(out[n], spans, strict=True):
                if end > start:
                    to[0, : end - start].copy_(flat[first + start : first + end], non_blocking=True)
        if s.uniform:
            return out, None
        there = torch.arange(start, stop, device="cpu") < many[pairs, None]
        return out, self._to_device(there[:, None])

    @contextmanager
    def beside(self) -> Iterator[Arrival]:
        """What is done within goes on beside what follows, after all that came before; the arrival says when it is
        done."""
        if self.device.type != "cuda":
            yield Arrival()
            return
        stream, event = _copies(self.device), torch.cuda.Event()
        stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(stream):
            yield Arrival(event)
            event.record(stream)

    def take(self, index: Tensor) -> tuple[Ragged, Arrival]:
        """The slots at `index` (int64 [B,H,n] into each list; -1: none), packed, on the device.

        Beside a GPU the copy runs on a stream of its own: the slots may be read after `Arrival.wait`."""
        index = index.cpu()
        taken = Ragged(self._gathered(index), index >= 0, own=True)
        columns, arrival = self._bring(taken.data | {"lens": taken.lens})
        taken.lens = columns.pop("lens")
        taken.data = columns
        return taken, arrival

    def read(self, index: Tensor) -> tuple[Columns, Arrival]:
        """`take` as columns [B,H,n,...], with anything where there is none."""
        return self._bring(self._gathered(index.cpu()))

    def _gathered(self, index: Tensor) -> Columns:
        """On the host, pinned beside a GPU."""
        out, before = {}, torch.zeros(index.shape[:2], dtype=torch.long, device="cpu")
        for s in self.segments:
            at = index - before[..., None]
            mine = (at >= 0) & (at < s.lens[..., None])
            rows = _starts(s)[..., None] + at
            first = not out
            rows = rows.masked_fill(~mine, 0).flatten() if first else rows[mine]
            for n, x in s.data.items():
                x = x.flatten(0, 2) if s.uniform else x
                if first:  # the longest: everything, as if it were all there
                    shape, pinned = (*index.shape, *x.shape[1:]), self.device.type == "cuda"
                    new = out[n] = torch.empty(shape, dtype=x.dtype, device="cpu", pin_memory=pinned)
                    torch.index_select(x, 0, rows, out=new.flatten(0, 2))
                elif len(rows):
                    out[n][mine] = x.index_select(0, rows)
            before = before + s.lens
        return out

    def _bring(self, columns: Columns) -> tuple[Columns, Arrival]:
        if self.device.type != "cuda":
            return columns, Arrival()
        # one stream for all: memory that one stream freed is not given to another
        stream, event = _copies(self.device), torch.cuda.Event()
        with torch.cuda.stream(stream):
            columns = {n: self._to_device(x) for n, x in columns.items()}
            event.record(stream)
        return columns, Arrival(event)

    def _to_device(self, x: Tensor) -> Tensor:
        return x.to(self.device, non_blocking=True)


class Arrival(State):
    """A copy that may still be under way on another stream; without an event it is there. Written for CUDA and not run
    there yet: on a CPU nothing is ever under way."""

    def __init__(self, event: Any = None):
        self.event = event

    @property
    def there(self) -> bool:
        return self.event is None or self.event.query()

    def wait(self, held: Any) -> None:
        """Let the current stream wait for it before anything that follows reads the tensors in `held`."""
        if self.event is not None:
            stream = torch.cuda.current_stream()
            stream.wait_event(self.event)
            for x in tensors(held):
                x.record_stream(stream)  # else their memory could be given to others while they are read
            self.event = None

    def __deepcopy__(self, memo: dict) -> Arrival:
        if self.event is not None:
            self.event.synchronize()
        return Arrival()


def _starts(s: Ragged) -> Tensor:
    """int64 [B,H], where each list begins in the flattened columns."""
    if s.uniform:
        return torch.arange(s.lens.numel(), device="cpu").view_as(s.lens) * s.longest
    flat = s.lens.flatten()
    return (flat.cumsum(0) - flat).view_as(s.lens)


def _width(s: Ragged, x: Tensor) -> int:
    """Bytes of one slot of a column."""
    return x.nbytes // max(1, x.shape[: 3 if s.uniform else 1].numel())
