"""Evicted tokens in host memory: appended to, read back in chunks, only for the heads that ask."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from calidrop.state import Host, Ragged
from calidrop.tokens import Tokens

CHUNK_BYTES = 16 << 20  # what one fetch brings to the device at once


class HostLog(Host):
    """An append-only log of tokens on the host. `segments` stay few: two of similar size are joined, so a token is
    copied O(log N) times however often decode-time eviction appends.
    """

    def __init__(self) -> None:
        self.segments: list[Ragged] = []
        self.device = torch.device("cpu")

    def append(self, t: Tokens) -> None:
        self.device = t.k.device
        pin = self.device.type == "cuda"
        host = {n: x.to("cpu") for n, x in {"k": t.k, "v": t.v, "pos": t.pos}.items()}
        self.segments.append(Ragged(host, t.valid.to("cpu")))
        while len(self.segments) > 1 and self.segments[-2].longest <= 2 * self.segments[-1].longest:
            last = self.segments.pop()
            data, valid = last.padded()
            keep = valid if valid is not None else torch.ones(data["pos"].shape, dtype=torch.bool)
            self.segments[-1] = self.segments[-1].append(data, keep)
        if pin:
            self.segments[-1].data = {n: x.pin_memory() for n, x in self.segments[-1].data.items()}

    def tokens(self) -> list[Tokens]:
        """Everything at once, on the device it came from: for tests."""
        return [self._on_device(t) for t in self._segments()]

    def chunks(self) -> Iterator[Tokens]:
        """Everything in pieces of about CHUNK_BYTES, on the device: for a block of queries that asks all heads."""
        for t in self._segments():
            step = max(1, CHUNK_BYTES * len(t) // max(1, t.k.nbytes + t.v.nbytes))
            for start in range(0, len(t), step):
                yield self._on_device(t.slice(start, start + step))

    def _segments(self) -> list[Tokens]:
        return [Tokens.from_columns(*s.padded()) for s in self.segments if s.longest]

    def _on_device(self, t: Tokens) -> Tokens:
        k, v, pos = (x.to(self.device, non_blocking=True) for x in (t.k, t.v, t.pos))
        return Tokens(k, v, pos, {}, t.dense)

    def fetch(self, asked: Tensor) -> Iterator[Tokens]:
        """Chunks of the tokens of the (row, kv head) pairs marked in `asked` (bool [B,H]), on the device.

        A chunk has the pairs as its batch, in `nonzero` order, and one head: k [P,1,n,D]."""
        pairs = asked.flatten().nonzero().flatten().cpu()
        for segment in self.segments:
            k = segment.data["k"]
            per_token = len(pairs) * (k.shape[-1] + segment.data["v"].shape[-1]) * k.element_size()
            step = max(1, CHUNK_BYTES // max(1, per_token))
            longest = int(segment.lens.flatten()[pairs].max())
            for start in range(0, longest, step):
                yield self._read(segment, pairs, start, min(start + step, longest))

    def _read(self, segment: Ragged, pairs: Tensor, start: int, stop: int) -> Tokens:
        if segment.uniform:
            cut = {n: x.flatten(0, 1)[:, start:stop].index_select(0, pairs) for n, x in segment.data.items()}
        else:
            lens = segment.lens.flatten()
            at = torch.arange(start, stop)
            there = at < lens[pairs, None]
            index = ((lens.cumsum(0) - lens)[pairs, None] + at).masked_fill(~there, 0)
            cut = {n: x[index] for n, x in segment.data.items()}
            cut["pos"] = cut["pos"].masked_fill(~there, -1)
        k, v, pos = (cut[n][:, None].to(self.device, non_blocking=True) for n in ("k", "v", "pos"))
        return Tokens(k, v, pos, {}, dense=segment.uniform)
