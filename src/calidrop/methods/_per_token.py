"""Formats that encode every token of a head by itself: they can be dropped, moved and rolled back one by one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from calidrop.coded import Coded
from calidrop.hadamard import hadamard
from calidrop.quant import LARGEST, SMALLEST, dequantize, rounded, unpack


def _there(k: Tensor, v: Tensor) -> list[tuple[str, Tensor]]:
    """What is to be encoded: no values where they are the keys (`Tokens`)."""
    return [("k", k), ("v", v)] if v.shape[-1] else [("k", k)]


def _names(data: dict[str, Tensor]) -> list[str]:
    return [n for n in ("k", "v") if n in data]


def _both(found: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """Keys and values of what `_there` or `_names` gave."""
    k, *v = found
    return k, v[0] if v else k[..., :0]


class PerToken(Coded):
    """Keys and values asymmetric round-to-nearest, one group per token and head.

    Columns: k, v uint8 [B,H,n,1,D*bits/8]; scales and zeros fp16 [B,H,n,1]."""

    def __init__(self, bits: int, rotate: bool):
        super().__init__(1)
        self.bits, self.rotate = bits, rotate

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        data = {}
        for name, x in _there(k, v):
            x = hadamard(x.float()) if self.rotate else x
            data[name], data[f"{name}_scale"], data[f"{name}_zero"] = rounded(x, self.bits)
        return data

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _both(
            dequantize(unpack(data[n], self.bits), data[f"{n}_scale"], data[f"{n}_zero"]) for n in _names(data)
        )

    def turn(self, q: Tensor) -> Tensor:
        return hadamard(q.float()) if self.rotate else q

    def unturn(self, o: Tensor) -> Tensor:
        return hadamard(o.float()) if self.rotate else o

    def restore(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return _both(hadamard(x) for _, x in _there(k, v)) if self.rotate else (k, v)

    def layout(self, q: Tensor) -> dict[str, Any]:
        return {"kind": "per token", "bits": self.bits, "rotate": self.rotate}

    def format(self) -> str:
        return f"{self.bits}-bit per token{', rotated' if self.rotate else ''}"


class Float8(Coded):
    """e4m3 with one fp16 scale per token and head for keys and one for values."""

    TOP = 448.0  # of e4m3

    def encode(self, k: Tensor, v: Tensor) -> dict[str, Tensor]:
        data = {}
        for name, x in _there(k, v):
            scale = (x.float().abs().amax(-1) / self.TOP).clamp(SMALLEST, LARGEST).to(torch.float16)
            # the scale was rounded: without the clamp, the largest value may lie above the format's and become NaN
            scaled = (x.float() / scale.float()[..., None]).clamp(-self.TOP, self.TOP)
            data[f"{name}_scale"] = scale
            data[name] = scaled.to(torch.float8_e4m3fn).view(torch.uint8)  # torch cannot index float8 everywhere
        return data

    def decode(self, data: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return _both(
            data[n].contiguous().view(torch.float8_e4m3fn).float() * data[f"{n}_scale"].float()[..., None]
            for n in _names(data)
        )

    def layout(self, q: Tensor) -> dict[str, Any]:
        return {"kind": "e4m3", "bits": 8}

    def format(self) -> str:
        return "8-bit floats per token"
