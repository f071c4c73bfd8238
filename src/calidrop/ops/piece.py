"""Stored tokens as they lie in memory, so that a kernel can answer for several stores at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from calidrop.attention import Partial, Queries
from calidrop.state import Note, Ragged

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MOST_QUERIES = 8


class Heard:
    """What one query said to the tokens of pieces, found by where their values lie: logits, fp32 [B,H,G,slots * group],
    -inf where a head has no token."""

    def __init__(self) -> None:
        self.found: dict[int, Tensor] = {}

    def room(self, p: Piece, rows: int, group: int) -> Tensor:
        """For what a kernel finds of a piece's tokens. Where heads differ, nobody writes what they do not have."""
        logits = self.room_for(p.columns["v"], (rows, p.heads, group, p.slots * p.group))
        return logits if p.lens is None else logits.fill_(float("-inf"))

    def room_for(self, values: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
        logits = self.found[values.data_ptr()] = torch.empty(shape, dtype=torch.float32, device=values.device)
        return logits

    def of(self, values: Tensor, slots: int) -> Tensor | None:
        """slots: of the longest head, so that a part of what was asked is not taken for the whole."""
        logits = self.found.get(values.data_ptr())
        return logits if logits is not None and logits.shape[-1] == slots else None


def values_of(data: dict[str, Tensor]) -> Tensor:
    """The column of values, which are the keys where there is none with channels (`Tokens`)."""
    v = data.get("v")
    return v if v is not None and v.shape[-1] else data["k"]


@dataclass(eq=False)  # one is made per store and step, and frozen ones are made in three times as long
class Piece:
    """A set of tokens that are all visible to the queries, and `answer`, which asks them in plain torch.

    kind: "exact", "per token" (codes with a scale and zero per token), "per group" (the same per token and group of
    `channels`), "e4m3" (8-bit floats with a scale per token), "per channel" (keys with a scale and zero per channel
    over units of `group` tokens, values per token over groups of `channels`) or "tiers" (the same, with the channels of
    keys sorted unit by unit: the first `tiers[0]` exact, the next `tiers[1]` with 4 bits, the others with 2, a scale
    and zero per channel over `tiers[2]` tokens: k16, k4 and k; order, uint8, says which channels they are; `bits` are
    those of values, 16 where they are exact). columns: k,
    v and, as the kind has them, k_scale, k_zero, v_scale, v_zero (fp16; per-token codes without zeros are symmetric),
    pos (where slots may be empty), bias (fp32, added to the logits); each [B,H,slots,...], or [slots,...] with all
    (row, head) one behind the other where `lens` [B,H] says how many each has. slots: of the longest head. rotate:
    whether codes are of channels behind a Hadamard rotation. q: queries of its own [B,Hq,T,D'], where keys have only
    some of the model's channels or others units; `answer` is asked with the whole queries nevertheless. mix: fp32
    [B,channels,channels], what every `channels` channels of an answer to per-token codes are multiplied with. note: of
    columns that will be asked again, for a kernel's use."""

    kind: str
    columns: dict[str, Tensor]
    lens: Tensor | None
    heads: int
    value_dim: int
    answer: Callable[[Queries], Partial]
    slots: int
    bits: int = 0
    group: int = 1
    channels: int = 0
    rotate: bool = False
    q: Tensor | None = None
    mix: Tensor | None = None
    tiers: tuple[int, int, int] = (0, 0, 0)
    note: Note | None = None

    def queries(self, qs: Queries) -> Tensor:
        """What is multiplied with the keys."""
        return qs.q if self.q is None else self.q

    @staticmethod
    def held(held: Ragged, names: tuple[str, ...], answer: Callable[[Queries], Partial], **layout: Any) -> Piece:
        """The named columns of a Ragged as far as it has them, without a copy. layout: the fields above that say how to
        read them."""
        columns = {name: held.data[name] for name in names if name in held.data}
        lens = None if held.uniform else held.lens
        columns["v"] = v = values_of(held.data)
        if v is columns.get("k"):
            columns |= {f"v_{x}": columns[f"k_{x}"] for x in ("scale", "zero") if f"k_{x}" in columns}
        width = v.shape[-1] * 8 // layout["bits"] if v.dtype == torch.uint8 else v.shape[-1]
        heads = held.lens.shape[1]
        return Piece(
            columns=columns, lens=lens, heads=heads, value_dim=width, answer=answer, slots=held.longest,
            note=held.note, **layout,
        )  # fmt: skip

    def pitch(self) -> tuple[int, int] | None:
        """How many slots lie between two rows and between two heads, the same for every column; (0, 0) where heads lie
        one behind the other, None where columns lie otherwise."""
        if self.lens is not None:
            return 0, 0
        found = set()
        for column in (x for x in self.columns.values() if x.numel()):
            shape, stride = column.shape, column.stride()
            width = 1
            for n, step in zip(shape[:1:-1], stride[:1:-1], strict=True):  # packed within a head
                if n > 1 and step != width:
                    return None
                width *= n
            width //= shape[2]
            row, head = (stride[0] if shape[0] > 1 else 0), (stride[1] if shape[1] > 1 else 0)
            if row % width or head % width:
                return None
            found.add((row // width, head // width))
        return found.pop() if len(found) == 1 else None


def refusal(qs: Queries) -> str:
    """Why no kernel answers these queries; "" where one may."""
    if qs.visible is not None:
        return "the model has a mask of its own"
    if len(qs) > MOST_QUERIES:
        return f"{len(qs)} queries at once, a kernel takes {MOST_QUERIES}"
    return "" if qs.q.dtype in DTYPES else f"queries are {qs.q.dtype}"
