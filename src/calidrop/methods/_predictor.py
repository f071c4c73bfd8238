"""The network that predicts the next row of block-pooled attention, and the rows it is given."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.methods import _artefact
from calidrop.state import State

NAME = "attention_predictor"
COMMAND = "calidrop train attention-predictor"
SHAPES = {
    "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,), "conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,),
    "head.weight": (32,), "head.bias": (1,),
}  # fmt: skip
ACTIVATION_BYTES = 64 << 20  # of the wider layer, at once


class Predictor(State):
    """Rows of one head, oldest first [N,R,blocks] -> the expected next row [N,blocks]: two 3x3 convolutions over time
    and blocks (1 -> 16 -> 32 channels, ReLU), the mean over time, and one weight per channel. 4,833 parameters, fp32.
    A constant shared by all layers and rows."""

    def __init__(self, weights: dict[str, Tensor]):
        self.weights = weights

    @staticmethod
    def fresh(seed: int = 0) -> Predictor:
        """Untrained: drawn as torch's own convolutions are."""
        draw, weights = torch.Generator().manual_seed(seed), {}
        for name, shape in SHAPES.items():
            fan = torch.Size(SHAPES[name.replace("bias", "weight")]).numel() // shape[0] if "head" not in name else 32
            weights[name] = (2 * torch.rand(shape, generator=draw) - 1) * fan**-0.5
        return Predictor(weights)

    def take_rows(self, rows: Tensor) -> None:
        pass

    def fork(self) -> Predictor:
        return self

    def on(self, device: torch.device) -> Predictor:
        return Predictor({n: x.to(device) for n, x in self.weights.items()})

    def next_row(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """real: bool [N,blocks], the blocks there are (None: all); the others are as if the row ended before them."""
        step = max(1, ACTIVATION_BYTES // max(1, 4 * 32 * x[0].numel())) if len(x) else 1
        cuts = (slice(i, i + step) for i in range(0, len(x), step))
        return torch.cat([self._some(x[at], None if real is None else real[at]) for at in cuts])

    def _some(self, x: Tensor, real: Tensor | None) -> Tensor:
        w = self.weights
        h = F.conv2d(x[:, None], w["conv1.weight"], w["conv1.bias"], padding=1).relu()
        if real is not None:
            h = h * real[:, None, None]
        h = F.conv2d(h, w["conv2.weight"], w["conv2.bias"], padding=1).relu()
        return torch.einsum("ncb,c->nb", h.mean(2), w["head.weight"]) + w["head.bias"]


def save(file: Path, predictor: Predictor, meta: dict[str, Any]) -> None:
    _artefact.save(NAME, file, meta, predictor.weights)


def load(file: str | None) -> tuple[Predictor, dict[str, Any]]:
    """None: what comes with the package, trained on the embedded model. Raises ValueError for another file."""
    if file is None:
        with resources.as_file(resources.files("calidrop") / "data" / f"{NAME}.safetensors") as path:
            meta, data = _artefact.load(NAME, str(path))
    else:
        meta, data = _artefact.load(NAME, file)
    found = {n: tuple(x.shape) for n, x in data.items()}
    if found != SHAPES:
        raise ValueError(f"{NAME}: expected tensors {SHAPES} in {file!r}, got {found}")
    return Predictor(data), meta


def pooled(weights: Tensor, block: int) -> Tensor:
    """[...,blocks*block] -> [...,blocks]"""
    return weights.unflatten(-1, (-1, block)).amax(-1)


def newest(rows: Tensor, real: Tensor, n: int) -> Tensor:
    """rows: [B,H,T,blocks], oldest first; real: bool [B,T]. -> the last n that are real, [B,H,n,blocks], zeros in front
    where there are fewer."""
    if rows.shape[2] < n:
        short = n - rows.shape[2]
        rows, real = F.pad(rows, (0, 0, short, 0)), F.pad(real, (short, 0))
    if not bool(real[:, -n:].all()):
        order = real.to(torch.int8).argsort(dim=-1, stable=True)  # those that are not first
        rows = (rows * real[:, None, :, None]).gather(2, order[:, None, :, None].expand_as(rows))
    return rows[:, :, -n:].contiguous()
