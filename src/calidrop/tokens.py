"""Exact tokens: keys, values, positions, and whatever a method keeps per token.

Dims everywhere: B batch, H kv heads, G query heads per kv head, Hq = H*G, T new queries, N tokens, D head dim,
W observed queries.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from calidrop.attention import values
from calidrop.state import gather


@dataclass
class Tokens:
    """k: [B,H,N,D], v: [B,H,N,Dv], rotated keys in the model's dtype; v has no channels where values are the keys
    themselves (latents of multi-head latent attention, `mla.py`). pos: int32 [B,H,N], the column of the token in
    the padded input; -1 marks an empty slot (left pads, and heads that hold fewer tokens than others).
    stats: named per-token columns [B,H,N]; they travel with every selection.
    dense: True when no slot is known to be empty (lets attention skip the check).
    logits: fp32 [B,H,G,N], what the one query of a step said to each, -inf to empty slots: while the step is observed,
    if attention left them (`Store.told`). Nothing that is made from tokens has them."""

    k: Float[Tensor, "B H N D"]
    v: Float[Tensor, "B H N Dv"]
    pos: Int[Tensor, "B H N"]
    stats: dict[str, Tensor] = field(default_factory=dict)
    dense: bool = False
    logits: Float[Tensor, "B H G N"] | None = None

    def __len__(self) -> int:
        return self.pos.shape[2]

    @property
    def values(self) -> Tensor:
        return values(self.k, self.v)

    @property
    def valid(self) -> Bool[Tensor, "B H N"]:
        return self.pos >= 0

    def columns(self) -> dict[str, Tensor]:
        """Everything per token under one name each; `from_columns` reads it back."""
        return {"k": self.k, "v": self.v, "pos": self.pos, **{f"stat:{n}": s for n, s in self.stats.items()}}

    @staticmethod
    def from_columns(columns: dict[str, Tensor], valid: Tensor | None) -> Tokens:
        """valid: bool [B,H,N], or None when every slot is real."""
        pos = columns["pos"] if valid is None else columns["pos"].masked_fill(~valid, -1)
        stats = {n.removeprefix("stat:"): s for n, s in columns.items() if n.startswith("stat:")}
        return Tokens(columns["k"], columns["v"], pos, stats, dense=valid is None)

    def slice(self, start: int, stop: int | None = None) -> Tokens:
        stats = {n: s[:, :, start:stop] for n, s in self.stats.items()}
        k, v, pos = (x[:, :, start:stop] for x in (self.k, self.v, self.pos))
        return Tokens(k, v, pos, stats, self.dense)

    def select(self, keep: Bool[Tensor, "B H N"]) -> Tokens:
        """The marked tokens, in order; heads with fewer are padded with empty slots at the end."""
        keep = keep & self.valid
        n = int(keep.sum(-1).max()) if keep.numel() else 0
        order = (~keep).to(torch.int8).argsort(dim=-1, stable=True)[..., :n]
        kept = keep.gather(2, order)
        return Tokens.from_columns({name: gather(x, order) for name, x in self.columns().items()}, kept)

    @staticmethod
    def cat(parts: list[Tokens]) -> Tokens:
        """Columns a part does not have are zero there."""
        if len(parts) == 1:
            return parts[0]
        like = {n: s for p in parts for n, s in p.stats.items()}
        stats = {
            n: torch.cat([p.stats[n] if n in p.stats else s.new_zeros(p.pos.shape) for p in parts], 2)
            for n, s in like.items()
        }
        k, v, pos = (torch.cat([getattr(p, name) for p in parts], 2) for name in ("k", "v", "pos"))
        return Tokens(k, v, pos, stats, all(p.dense for p in parts))
