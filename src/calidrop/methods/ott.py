from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calidrop.coded import Coded
from calidrop.methods.kivi import decode, encode
from calidrop.observe import Observation
from calidrop.parts import Layer, Storage, check_choice, check_int, method
from calidrop.quant import whole_bytes
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens


class Traced(Coded):
    """Blocks quantized like KIVI's, with the tokens of smallest keys kept exact in a pool per (row, head).

    Where a token went to the pool its block holds the mean of the others and an empty slot, which nothing attends.
    Tokens that smaller ones push out of the pool go to `spill`, exact; when that is full a head stops tracing.
    """

    def __init__(self, bits: int, block: int, channels: int, pool: int, spill: int):
        super().__init__(block)
        self.bits, self.channels, self.size, self.room = bits, channels, pool, spill
        self.beside = [Exact(), Exact()] if pool else []

    @property
    def pool(self) -> Exact:
        return self.beside[0]

    @property
    def spill(self) -> Exact:
        return self.beside[1]

    def prepare(self, t: Tokens, obs: Observation) -> Tokens:
        if not self.size:
            return t
        blocks = [t.slice(i, i + self.group) for i in range(0, len(t), self.group)]
        return Tokens.cat([self._trace(block, obs) for block in blocks])

    def _trace(self, block: Tokens, obs: Observation) -> Tokens:
        pooled = self.pool.open()
        both = Tokens.cat([*pooled, block])
        old = len(both) - len(block)
        was = torch.arange(len(both), device=block.pos.device) < old
        norm = both.k.float().abs().sum(-1).masked_fill(~both.valid, float("inf"))
        order = norm.sort(dim=-1, stable=True).indices
        rank = torch.empty_like(order).scatter_(
            -1, order, torch.arange(len(both), device=order.device).expand_as(order)
        )
        chosen = torch.where(self._tracing(block)[..., None], rank < self.size, was) & both.valid
        self.pool.add(both.select(chosen), obs)
        pushed = both.valid & was & ~chosen
        if bool(pushed.any()):
            self.spill.add(both.select(pushed), obs)
        return _without(block, chosen[:, :, old:])

    def _tracing(self, t: Tokens) -> Tensor:
        """bool [B,H]"""
        if self.spill.held is None:
            return torch.ones(t.pos.shape[:2], dtype=torch.bool, device=t.pos.device)
        return self.spill.held.lens < self.room

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return encode(k, v, self.bits, self.channels)

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decode(data, self.bits, self.channels)

    def layout(self, q: Tensor) -> dict[str, Any]:
        return {"kind": "per channel", "bits": self.bits, "channels": self.channels}

    def format(self) -> str:
        return f"{self.bits}-bit with {self.size} smallest keys traced"


def _without(t: Tokens, out: Tensor) -> Tokens:
    """t with the slots in `out` emptied and holding the mean of the rest, so that they do not stretch its range."""
    stay = (t.valid & ~out)[..., None]
    n = stay.sum(2, keepdim=True).clamp(min=1)
    k, v = (
        torch.where(out[..., None], ((x.float() * stay).sum(2, keepdim=True) / n).to(x.dtype), x) for x in (t.k, t.v)
    )
    return Tokens(k, v, t.pos.masked_fill(out, -1), t.stats)


@method("OTT, arXiv 2505.10938")
def ott(
    bits: int = 2, block: int = 128, pool: int = 3, spill: int = 32, skip: int = 2, residual: int | None = None
) -> Storage:
    """OTT (Su et al., arXiv 2505.10938, sec. 3): outlier tokens, those of smallest keys, stay exact outside the groups.

    bits: 2, 4 or 8. block: tokens quantized together, keys per channel over them, values per token over the head. pool:
    the tokens of smallest L1 key norm over everything so far, per kv head. spill: how many that were pushed out of the
    pool are kept exact before tracing stops. skip: first layers without a pool. residual: the last tokens that stay
    exact (32 when None) if no evictor decides that. Bytes per token and head, D channels: D * bits / 4 + 4 * D / block
    + 4, the pools come on top.

    Deviations: none known; the paper does not say whether the pool is per head or per layer (per kv head here), and
    placeholders are masked. `pool=0` is KIVI with these groups.
    """
    check_choice("ott: bits", bits, (2, 4, 8))
    check_int("ott: block", block, 8)
    for name, value in (("pool", pool), ("spill", spill), ("skip", skip)):
        check_int(f"ott: {name}", value, 0)
    if residual is not None:
        check_int("ott: residual", residual, 0)
    if not whole_bytes(block, bits):
        raise ValueError(f"ott: block must fill whole bytes at {bits} bits, got {block}")
    if pool >= block:
        raise ValueError(f"ott: pool must be smaller than block, got pool={pool} and block={block}")

    def make(layer: Layer) -> Store:
        if not whole_bytes(layer.value_dim, bits):
            raise ValueError(f"ott: head_dim must fill whole bytes at {bits} bits, got {layer.value_dim}")
        return Traced(bits, block, layer.value_dim, pool if layer.index >= skip else 0, spill)

    return Storage(make, 32 if residual is None else residual, block, chose_recent=residual is not None)
