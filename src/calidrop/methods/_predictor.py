"""The network that predicts the next row of block-pooled attention, and the file it is kept in."""

from __future__ import annotations

from abc import ABC, abstractmethod
from importlib import resources
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop.methods import _artefact
from calidrop.ops import predicting
from calidrop.state import Shared

NAME = "attention_predictor"
COMMAND = "calidrop train attention-predictor"
SHAPES = {
    "conv1.weight": (16, 1, 3, 3), "conv1.bias": (16,), "conv2.weight": (32, 16, 3, 3), "conv2.bias": (32,),
    "head.weight": (32,), "head.bias": (1,),
}  # fmt: skip
ROOTS = {1.0: 0, 0.5: 1, 0.25: 2}  # how many square roots a power is
REACH = 2  # rows and blocks that two convolutions see to either side
SEEN = 2 * REACH + 1
ACTIVATION_BYTES = 64 << 20  # of the wider layer, at once


class Expectation(Shared, ABC):
    """Rows of one head, oldest first [N,R,blocks] -> the expected next row [N,blocks]: a mean over time of what each
    adds. power: what rows are raised to, and what is expected. decay: how much less each older row weighs."""

    def __init__(self, power: float, decay: float):
        self.power, self.decay = power, decay

    def next_row(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """real: bool [N,blocks], the blocks there are (None: all); the others are as if the row ended before them."""
        share = self.shares(x.shape[1], x.device)
        return self.finish(torch.einsum("ntb,t->nb", self.terms(x, real), share / share.sum()))

    def shares(self, rows: int, device: torch.device) -> Tensor:
        """What each row weighs, the newest 1."""
        return self.decay ** torch.arange(rows - 1, -1, -1, device=device, dtype=torch.float32)

    def raised(self, x: Tensor) -> Tensor:
        if self.power == 0.25:
            return x.sqrt().sqrt()  # in a quarter of the time
        return x if self.power == 1 else x**self.power

    @abstractmethod
    def terms(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        """What every row adds, [N,R,blocks]; it sees REACH rows and blocks to either side at most."""

    @abstractmethod
    def edge(self, x: Tensor, real: Tensor | None, newest: bool) -> Tensor:
        """What the last rows add (newest: False: the first), of which no more than the last SEEN is needed: x
        [N,SEEN,blocks] -> [N,REACH+1,blocks]."""

    def follows(self, history: Tensor) -> bool:
        """Whether `follow` can be asked."""
        return False

    def follow(
        self, history: Tensor, weights: Tensor, ids: Tensor | None, real: Tensor | None, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A whole step, as `predicting.follow` says, where the oldest rows weigh next to nothing."""
        raise NotImplementedError

    @abstractmethod
    def finish(self, mean: Tensor) -> Tensor:
        """The expectation from the mean over time."""

    @abstractmethod
    def on(self, device: torch.device) -> Expectation:
        """A copy there."""


class Average(Expectation):
    """The mean of the rows themselves."""

    def __init__(self, power: float = 0.25, decay: float = 0.7):
        super().__init__(power, decay)

    def terms(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        return self.raised(x)

    def edge(self, x: Tensor, real: Tensor | None, newest: bool) -> Tensor:
        return self.terms(x[:, REACH:] if newest else x[:, : REACH + 1])

    def finish(self, mean: Tensor) -> Tensor:
        return mean

    def on(self, device: torch.device) -> Average:
        return self


class Predictor(Expectation):
    """The network: two 3x3 convolutions over time and blocks (1 -> 16 -> 32 channels, ReLU), the mean over time, and
    one weight per channel. 4,833 parameters, fp32. power and decay are 1 in the paper."""

    def __init__(self, weights: dict[str, Tensor], power: float = 1.0, decay: float = 1.0):
        super().__init__(power, decay)
        self.weights = weights

    @staticmethod
    def fresh(power: float = 1.0, decay: float = 1.0, seed: int = 0) -> Predictor:
        """Untrained: drawn as torch's own convolutions are."""
        draw, weights = torch.Generator().manual_seed(seed), {}
        for name, shape in SHAPES.items():
            fan = torch.Size(SHAPES[name.replace("bias", "weight")]).numel() // shape[0] if "head" not in name else 32
            weights[name] = (2 * torch.rand(shape, generator=draw, dtype=torch.float32, device="cpu") - 1) * fan**-0.5
        return Predictor(weights, power, decay)

    def on(self, device: torch.device) -> Predictor:
        return Predictor({n: x.to(device) for n, x in self.weights.items()}, self.power, self.decay)

    def terms(self, x: Tensor, real: Tensor | None = None) -> Tensor:
        step = max(1, ACTIVATION_BYTES // max(1, 4 * 32 * x[0].numel())) if len(x) else 1
        cuts = (slice(i, i + step) for i in range(0, len(x), step))
        return torch.cat([self._some(x[at], None if real is None else real[at]) for at in cuts])

    def edge(self, x: Tensor, real: Tensor | None, newest: bool) -> Tensor:
        if not predicting.runs_networks(x):
            return self._some(x, real, (0, 1) if newest else (1, 0))
        return predicting.network(self.raised(x), real, self._given, newest)

    @property
    def _given(self) -> list[Tensor]:
        return [self.weights[n] for n in SHAPES if n != "head.bias"]

    def follows(self, history: Tensor) -> bool:
        return self.power in ROOTS and predicting.runs_networks(history)

    def follow(
        self, history: Tensor, weights: Tensor, ids: Tensor | None, real: Tensor | None, sums: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        bias = self.weights["head.bias"].item()
        return predicting.follow(history, weights, ids, real, sums, ROOTS[self.power], self.decay, self._given, bias)

    def finish(self, mean: Tensor) -> Tensor:
        return mean + self.weights["head.bias"]

    def _some(self, x: Tensor, real: Tensor | None, ends: tuple[int, int] = (1, 1)) -> Tensor:
        """ends: whether (1) the rows end before the first and behind the last of x, or (0) go on there, where what two
        further rows would have to say is left out."""
        h = self._conv(self.raised(x)[:, None], "conv1", ends)
        if real is not None:
            h = h * real[:, None, None]
        h = self._conv(h, "conv2", ends)
        return torch.einsum("nctb,c->ntb", h, self.weights["head.weight"])

    def _conv(self, x: Tensor, name: str, ends: tuple[int, int]) -> Tensor:
        w, bias = self.weights[f"{name}.weight"], self.weights[f"{name}.bias"]
        return F.conv2d(F.pad(x, (0, 0, *ends)), w, bias, padding=(0, 1)).relu_()


def save(file: Path, predictor: Predictor, meta: dict[str, Any]) -> None:
    _artefact.save(NAME, file, meta, predictor.weights)


def load(file: str | None) -> tuple[Predictor, dict[str, Any]]:
    """None: what comes with the package, trained on the embedded model. Raises ValueError for another file."""
    if file is None:
        with resources.as_file(resources.files("calidrop") / "data" / f"{NAME}.safetensors") as path:
            meta, data = _artefact.load(NAME, str(path))
    else:
        meta, data = _artefact.load(NAME, file)
    meta = {"power": 1.0, "decay": 1.0} | meta
    found = {n: tuple(x.shape) for n, x in data.items()}
    if found != SHAPES:
        raise ValueError(f"{NAME}: expected tensors {SHAPES} in {file!r}, got {found}")
    return Predictor(data, meta["power"], meta["decay"]), meta
