from typing import Any

import torch
from torch import Tensor

from calidrop.coded import Coded
from calidrop.observe import Observation
from calidrop.parts import Layer, Rest, check_choice, method
from calidrop.quant import dequantize, pack, quantize, unpack, whole_bytes
from calidrop.store import Store
from calidrop.tokens import Tokens


class Balanced(Coded):
    """Tokens at low bits per token, keys scaled channel by channel before rounding so that channels with large keys and
    small queries do not eat the range. The scale is set with the first tokens and stays.

    Columns as in per-token formats; `balance` fp32 [B,H,1,1,D]."""

    def __init__(self, bits: int, channels: int, balancer: bool):
        super().__init__(1)
        self.bits, self.channels, self.balancer = bits, channels, balancer
        self.q_max: Tensor | None = None  # [B,Hq,D], over the queries until the first tokens come
        self.balance: Tensor | None = None
        self.missing: Tensor | None = None  # bool [B,H], heads that have had no token, where others had

    @property
    def settled(self) -> bool:
        return self.balance is not None and self.missing is None

    def observe(self, step: Observation) -> None:
        if self.settled or not self.balancer:
            return
        qs = step.queries
        q = qs.q.float().abs() * (qs.pos >= 0)[:, None, :, None]
        self.q_max = q.amax(2) if self.q_max is None else torch.maximum(self.q_max, q.amax(2))  # [B,Hq,D]

    def prepare(self, t: Tokens, obs: Observation) -> Tokens:
        if self.settled:
            return t
        B, H, _, D = t.k.shape
        if self.balance is None or self.missing is None:
            self.balance = torch.ones(B, H, 1, 1, D, dtype=torch.float32, device=t.k.device)
            self.missing = torch.ones(B, H, dtype=torch.bool, device=t.k.device)
        came = t.valid.any(-1)
        if self.q_max is not None:
            q_max = self.q_max.view(B, H, -1, D).amax(2)
            k_max = (t.k.float().abs() * t.valid[..., None]).amax(2)
            ratio = (q_max / k_max).sqrt()
            ratio = torch.where((q_max > 0) & (k_max > 0), ratio, torch.ones_like(ratio)).clamp(2.0**-10, 2.0**10)
            new = (came & self.missing)[:, :, None, None, None]
            self.balance = torch.where(new, ratio[:, :, None, None], self.balance)
        self.missing = self.missing & ~came
        if not bool(self.missing.any()):
            self.missing = self.q_max = None
        return t

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        assert self.balance is not None
        data = {}
        for name, x in (("k", k.float() * self.balance), ("v", v)):
            codes, data[f"{name}_scale"], data[f"{name}_zero"] = quantize(
                x.unflatten(-1, (-1, self.channels)), self.bits
            )
            data[name] = pack(codes.flatten(-2), self.bits)
        return data

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        assert self.balance is not None
        k, v = (
            dequantize(
                unpack(data[n], self.bits).unflatten(-1, (-1, self.channels)), data[f"{n}_scale"], data[f"{n}_zero"]
            ).flatten(-2)
            for n in ("k", "v")
        )
        return k, v

    def turn(self, q: Tensor) -> Tensor:
        if self.balance is None:
            return q
        balance = self.balance[:, :, 0, 0].repeat_interleave(q.shape[1] // self.balance.shape[1], 1)
        return q / balance[:, :, None]

    def restore(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        assert self.balance is not None
        return k / self.balance[:, :, 0], v

    def layout(self, q: Tensor) -> dict[str, Any]:
        return {"kind": "per group", "bits": self.bits, "channels": self.channels, "q": self.turn(q).to(q.dtype)}

    def format(self) -> str:
        return f"{self.bits}-bit{' balanced' if self.balancer else ''}"


@method("MiKV, arXiv 2402.18096")
def mikv(bits: int = 2, balancer: bool = True) -> Rest:
    """MiKV (Yang et al., arXiv 2402.18096, sec. 3.2-3.3): no token left behind, evicted ones are kept at low bits.

    bits: 2, 3 or 4, asymmetric per token over groups of half a head (so that the two halves of a rotary pair do not
    share a scale). balancer: keys are multiplied by sqrt(max|q| / max|k|) per channel before rounding. The important
    tokens are those the evictor keeps, so `h2o(budget=0.2)+mikv(bits=2)` is the paper's setting. Demotion is one-way.
    Bytes per evicted token and head, D channels: 2 * (D * bits / 8 + 8).

    On SmolLM2 (64 channels a head) 2 bits lose more than H2O alone at equal bytes; 3 and 4 bits win by far (LOG.md).

    Deviations: the largest key is taken over the tokens demoted first rather than over the whole prompt (only those are
    rounded), the largest query over the group of a kv head.
    """
    check_choice("mikv: bits", bits, (2, 3, 4))
    check_choice("mikv: balancer", balancer, (True, False))

    def make(layer: Layer) -> Store:
        half = layer.head_dim // 2
        if layer.head_dim % 2 or not whole_bytes(layer.head_dim, bits):
            raise ValueError(
                f"mikv: half a head must be whole and fill bytes at {bits} bits, got head_dim={layer.head_dim}"
            )
        return Balanced(bits, half, balancer)

    return Rest(make)
