"""Stored tokens as they lie in memory, so that a kernel can answer for several stores at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from calidrop.attention import Partial, Queries
from calidrop.state import Ragged


@dataclass(frozen=True)
class Piece:
    """A set of tokens that are all visible to the queries, and `answer`, which asks them in plain torch.

    kind: "exact", "per token" (codes with a scale and zero per token) or "per channel" (keys with a scale and zero per
    channel over units of `group` tokens, values per token over groups of `channels`). columns: k, v and, as the kind
    has them, k_scale, k_zero, v_scale, v_zero (fp16), pos (where slots may be empty), bias; each [B,H,slots,...], or
    [slots,...] with all (row, head) one behind the other where `lens` [B,H] says how many each has.
    rotate: whether codes are of channels behind a Hadamard rotation."""

    kind: str
    columns: dict[str, Tensor]
    lens: Tensor | None
    heads: int
    value_dim: int
    answer: Callable[[Queries], Partial]
    bits: int = 0
    group: int = 1
    channels: int = 0
    rotate: bool = False

    @staticmethod
    def held(held: Ragged, names: tuple[str, ...], answer: Callable[[Queries], Partial], **layout: Any) -> Piece:
        """The named columns of a Ragged, without a copy. layout: the fields above that say how to read them."""
        columns = {name: held.data[name] for name in names}
        lens = None if held.uniform else held.lens
        width = held.data["v"].shape[-1] * (8 // layout.get("bits", 8))
        return Piece(columns=columns, lens=lens, heads=held.lens.shape[1], value_dim=width, answer=answer, **layout)
