"""Which tokens a cache holds, and in what form: how parts of it answer to "what did it throw away?"."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, get_args

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from calidrop.state import Ragged

Form = Literal["exact", "coded", "host", "summary", "gone", "blind"]
FORMS: tuple[Form, ...] = get_args(Form)
"""Best first. exact: as it came, on the device. coded: on the device in fewer bits, channels or dims. host: in host
memory, to be asked again. summary: only as a part of what stands for many tokens. gone: freed. blind: freed, but the
model itself does not look back so far in this layer, whatever the cache."""


@dataclass(frozen=True)
class Holding:
    """Tokens in one form. how: in a few words, for people. pos: [B,H,N], the columns they came in, -1: none; None: all
    that were taken in and are in no other holding of the layer."""

    form: Form
    how: str
    pos: Int[Tensor, "B H N"] | None

    def narrower(self, how: str) -> Holding:
        """The same as part of a store that was handed less than the token (fewer channels, say)."""
        if self.form not in ("exact", "coded"):
            return self
        return replace(self, form="coded", how=how if self.form == "exact" else f"{how}; {self.how}")


def positions(held: Ragged) -> Int[Tensor, "B H N"]:
    """The column "pos" of a Ragged, whatever it has per slot, -1 where there is nothing."""
    data, valid = held.only("pos").padded()
    pos = data["pos"].flatten(3) if data["pos"].dim() > 3 else data["pos"][..., None]
    return (pos if valid is None else pos.masked_fill(~valid[..., None], -1)).flatten(2)


def places(holdings: Sequence[Holding], real: Bool[Tensor, "B C"], heads: int) -> Int[Tensor, "B H C"]:
    """For every column of every kv head, which of the holdings has it: where several do, that of the best form; -1
    where none does and where `real` says that the column is a pad."""
    B, C = real.shape
    out = torch.full((B, heads, C + 1), -1, device=real.device)  # the last column is for empty slots
    for i in sorted(range(len(holdings)), key=lambda i: -FORMS.index(holdings[i].form)):
        pos = holdings[i].pos
        if pos is None:
            out[:] = i
        else:
            at = torch.where(pos < 0, C, pos).long().to(out.device)
            out.scatter_(2, at, i)
    return out[..., :C].masked_fill(~real[:, None], -1)
