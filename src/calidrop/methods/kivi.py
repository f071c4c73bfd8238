from typing import Any

from torch import Tensor

from calidrop.coded import Coded
from calidrop.parts import Layer, Storage, check_choice, check_int, method
from calidrop.quant import dequantize, rounded, unpack, whole_bytes
from calidrop.store import Store


def encode(k: Tensor, v: Tensor, bits: int, channels: int) -> dict[str, Tensor]:
    """k, v: [B,H,units,group,D]. Keys per channel over the unit, values per token over groups of `channels`.

    -> k [B,H,units,D,group*bits/8], v [B,H,units,group,D*bits/8], and their scales and zeros."""
    k, k_scale, k_zero = rounded(k.transpose(-1, -2), bits)
    v, v_scale, v_zero = rounded(v.unflatten(-1, (-1, channels)), bits)
    return {
        "k": k, "k_scale": k_scale, "k_zero": k_zero,
        "v": v.flatten(-2), "v_scale": v_scale, "v_zero": v_zero,
    }  # fmt: skip


def decode(data: dict[str, Tensor], bits: int, channels: int) -> tuple[Tensor, Tensor]:
    """The inverse of `encode`, fp32."""
    k = dequantize(unpack(data["k"], bits), data["k_scale"], data["k_zero"]).transpose(-1, -2)
    codes = unpack(data["v"], bits).unflatten(-1, (-1, channels))
    return k, dequantize(codes, data["v_scale"], data["v_zero"]).flatten(-2)


class ChannelKeys(Coded):
    """Keys quantized per channel over units of `group` tokens, values per token over groups of `group` channels."""

    def __init__(self, bits: int, group: int):
        super().__init__(group)
        self.bits = bits

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        return encode(k, v, self.bits, self.group)

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return decode(data, self.bits, self.group)

    def layout(self, q: Tensor) -> dict[str, Any]:
        return {"kind": "per channel", "bits": self.bits, "channels": self.group}

    def format(self) -> str:
        return f"{self.bits}-bit keys per channel, values per token"


@method("KIVI, arXiv 2402.02750")
def kivi(bits: int = 2, group: int = 32, residual: int | None = None) -> Storage:
    """KIVI (Liu et al., arXiv 2402.02750, alg. 1): asymmetric round-to-nearest, keys per channel, values per token.

    bits: 2, 4 or 8. group: tokens per key group and channels per value group; must divide head_dim. residual: the last
    tokens that stay exact (128 when None) if no evictor decides that. Bytes per token and head, D channels, fp16 scale
    and zero: 2 * (D * bits / 8 + 4 * D / group).

    Deviations: keys and values leave the exact window together, in groups of `group` (the paper moves keys `residual`
    at a time and values one by one), so between `residual` and `residual + 2 * group` tokens are exact; constant groups
    have scale 1 (0/0 in the reference). After an evictor, a second prompt ranks the decoded tokens again and rounds
    what stays again.
    """
    check_choice("kivi: bits", bits, (2, 4, 8))
    check_int("kivi: group", group, 8)
    if residual is not None:
        check_int("kivi: residual", residual, 1)
    if not whole_bytes(group, bits):
        raise ValueError(f"kivi: group must fill whole bytes at {bits} bits, got {group}")

    def make(layer: Layer) -> Store:
        if layer.value_dim % group:
            raise ValueError(f"kivi: group must divide head_dim, got group={group} and head_dim={layer.value_dim}")
        return ChannelKeys(bits, group)

    return Storage(make, 128 if residual is None else residual, group, chose_recent=residual is not None)
