from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from calidrop.coded import Coded
from calidrop.observe import Observation
from calidrop.parts import Layer, Storage, check_choice, check_int, method
from calidrop.quant import dequantize, pack, quantize, unpack
from calidrop.store import Store


class Tiers(Coded):
    """Blocks whose key channels are sorted by query weight times rounding step: the first stay as they are, the next
    get 4 bits, the others 2; values 2 bits per token.

    Columns: order uint8 or int16 [B,H,n,D], k16 [B,H,n,block,n16], and codes, scales and zeros of the other tiers, per
    channel over groups of tokens: k4 [B,H,n,n4,block/2] and, of 2 bits, k [B,H,n,n2,block/4]."""

    def __init__(self, block: int, group: int, quota: tuple[int, int, int], values: int, channels: int):
        """group: tokens that share a key's scale. channels: those that share a value's."""
        super().__init__(block)
        self.per, self.quota, self.values, self.channels = group, quota, values, channels
        self.sum: Tensor | None = None  # [B,Hq,D]: |q| over the queries since the last flush

    def observe(self, step: Observation) -> None:
        qs = step.queries
        total = (qs.q.float().abs() * (qs.pos >= 0)[:, None, :, None]).sum(2)
        self.sum = total if self.sum is None else self.sum + total

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        assert self.sum is not None
        B, H, _, _, D = k.shape
        importance = self.sum.view(B, H, 1, -1, D).sum(3)  # the mean up to a constant
        span = k.float().amax(3) - k.float().amin(3)  # [B,H,n,D], the rounding step up to a constant
        order = (importance * span).sort(dim=-1, descending=True, stable=True).indices
        sorted_k = k.gather(4, order[:, :, :, None].expand(k.shape))
        n16, n4, _ = self.quota
        data = {"order": order.to(torch.uint8 if D <= 256 else torch.int16), "k16": sorted_k[..., :n16].contiguous()}
        for name, bits, part in (("k4", 4, sorted_k[..., n16 : n16 + n4]), ("k", 2, sorted_k[..., n16 + n4 :])):
            if part.shape[-1]:
                data |= _coded(name, part.transpose(-1, -2), bits, self.per)
        if self.values == 16:
            return data | {"v": v}
        return data | _coded("v", v, self.values, self.channels)

    def encoded(self, units: Tensor) -> None:
        assert self.sum is not None
        flushed = units.flatten(1).any(1)  # other rows wait for more tokens, and go on
        self.sum = None if bool(flushed.all()) else self.sum.masked_fill(flushed[:, None, None], 0.0)

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        tiers = [_decoded(data, n, b, self.per).transpose(-1, -2) for n, b in (("k4", 4), ("k", 2)) if n in data]
        sorted_k = torch.cat([data["k16"].float(), *tiers], -1)
        order = data["order"].long()[:, :, :, None].expand(sorted_k.shape)
        k = torch.empty_like(sorted_k).scatter_(4, order, sorted_k)
        if self.values == 16:
            return k, data["v"]
        return k, _decoded(data, "v", self.values, self.channels)

    def layout(self, q: Tensor) -> dict[str, Any]:
        tiers = (*self.quota[:2], self.per)
        return {"kind": "tiers", "bits": self.values, "channels": self.channels, "tiers": tiers}

    def format(self) -> str:
        return "{}/{}/{} key channels at 16/4/2 bits, {}-bit values".format(*self.quota, self.values)


def _coded(name: str, x: Tensor, bits: int, group: int) -> dict[str, Tensor]:
    codes, scale, zero = quantize(x.unflatten(-1, (-1, group)), bits)
    return {name: pack(codes.flatten(-2), bits), f"{name}_scale": scale, f"{name}_zero": zero}


def _decoded(data: dict[str, Tensor], name: str, bits: int, group: int) -> Tensor:
    codes = unpack(data[name], bits).unflatten(-1, (-1, group))
    return dequantize(codes, data[f"{name}_scale"], data[f"{name}_zero"]).flatten(-2)


@method("MixKVQ, arXiv 2512.19206")
def mixkvq(
    quota: tuple[int, int, int] | None = None,
    values: int = 2,
    group: int = 32,
    block: int = 128,
    residual: int | None = None,
) -> Storage:
    """MixKVQ (arXiv 2512.19206, fig. 4): key channels get 16, 4 or 2 bits by how much rounding them would hurt queries,
    A_d = mean |q_d| * step_d; values 2 bits per token.

    quota: how many channels of a head get 16, 4 and 2 bits (None: 1/32, 3/32 and the rest). values: their bits, 2, 4, 8
    or 16 (as they are). block: tokens that share an
    order of channels. group: tokens per key group and channels per value group. residual: the last tokens that stay
    exact (`block` when None) if no evictor decides that. Bytes per token and head with quota (a, b, c), D channels and
    elements of e bytes: a e + b / 2 + c / 4 + 4 (b + c) / group + D / 4 + 4 D / group + D / block.

    Deviations: a fixed quota per kv head instead of thresholds (whose values are not published), which keeps tiers
    rectangular; mean |q_d| is over the queries since the last flush (for a prompt, all of its queries).
    """
    check_choice("mixkvq: values", values, (2, 4, 8, 16))
    check_int("mixkvq: group", group, 8)
    check_int("mixkvq: block", block, 8)
    if residual is not None:
        check_int("mixkvq: residual", residual, 0)
    if block % group:
        raise ValueError(f"mixkvq: group must divide block, got group={group} and block={block}")
    if quota is not None:
        if not isinstance(quota, tuple | list) or len(quota) != 3:
            raise ValueError(f"mixkvq: quota must be three numbers of channels (16, 4 and 2 bits), got {quota!r}")
        for n in quota:
            check_int("mixkvq: quota", n, 0)

    def make(layer: Layer) -> Store:
        D = layer.head_dim
        n16, n4 = max(1, D // 32), 3 * max(1, D // 32)
        n = tuple(quota) if quota is not None else (n16, n4, D - n16 - n4)
        if sum(n) != D:
            raise ValueError(f"mixkvq: quota must sum up to head_dim, got {n} and head_dim={D}")
        channels = min(group, layer.value_dim)
        if layer.value_dim % channels:
            raise ValueError(f"mixkvq: group must divide head_dim, got group={group} and head_dim={layer.value_dim}")
        return Tiers(block, group, (n[0], n[1], n[2]), values, channels)

    return Storage(make, block if residual is None else residual, block, residual is not None, weighs=True)
