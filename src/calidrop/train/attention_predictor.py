"""AttentionPredictor's training (Yang et al., arXiv 2502.04077): the next row of block-pooled attention from the rows
before it, by least squares.

The paper does not say how its network was trained. Here: windows of a book as prompts; the rows of their last queries,
as teacher-forced decoding would have them; every step a batch of heads of all layers at one such row, Adam. The columns
are what a cache would have on its host there: neither sinks nor the newest tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from calidrop import __version__
from calidrop.attention import Partial, Queries
from calidrop.cache import KVCache, layers_of
from calidrop.holding import Holding
from calidrop.methods._predictor import Average, Predictor, save
from calidrop.methods._rows import pooled_rows
from calidrop.observe import Observation
from calidrop.ops.piece import Piece
from calidrop.parts import Deputies, Layer, Selector, check_int, check_number
from calidrop.plugin import using
from calidrop.recipe import Recipe
from calidrop.store import Store
from calidrop.tokens import Tokens
from calidrop.train._part import PartFile
from calidrop.train._text import digest

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""

SINKS, RECENT = 64, 64  # tokens at either end whose blocks are no candidates
WAYS = ("attention_predictor", "last row", "mean row", "moving average", "snapkv once")
KS = (4, 8, 16, 32)
GENERATED = 128
HEADS = 8  # maps in a batch
RATE = 3e-3


class _Rows(Store):
    """Of a prompt keeps nothing but what its last queries paid every block, fp32 [B,H,W,blocks]."""

    def __init__(self, block: int):
        self.block = block
        self.rows: Tensor | None = None

    def add(self, t: Tokens, obs: Observation) -> None:
        self.rows = pooled_rows(obs, t, self.block)

    def attend(self, qs: Queries) -> list[Partial | Piece]:
        return []

    def tokens(self) -> list[Tokens]:
        return []

    @property
    def drops(self) -> bool:
        return True

    def holdings(self) -> list[Holding]:
        return [Holding("gone", "seen in rows of attention", None)]

    def describe(self) -> str:
        return "rows of attention"


@dataclass(frozen=True, kw_only=True)
class _Probe(Selector):
    block: int

    def store(self, layer: Layer, kept: Callable[[], Store], rest: Store | None, stand: Deputies | None) -> Store:
        return _Rows(self.block)


@torch.inference_mode()
def rows_of(model: Any, ids: Tensor, n: int, block: int) -> Tensor:
    """What the last n tokens of `ids` [length] pay each block of it: fp32 [layers*H,n,length/block]. One pass."""
    cache = KVCache(model, Recipe((_Probe(recent=0, every=None, observe=n, block=block),)), eager=True)
    model(ids[None].to(model.device), **using(cache), use_cache=True, logits_to_keep=1)
    stores = (layer.state.store for layer in cache.layers_here)
    return torch.cat([store.rows[0].cpu() for store in stores if isinstance(store, _Rows) and store.rows is not None])


def candidates(length: int, n: int, row: int, block: int) -> slice:
    """The columns that are on the host when the row-th of the last n of `length` tokens is decoded."""
    return slice(SINKS // block, (length - n + row - RECENT) // block)


def train(
    model: Any,
    ids: Tensor,
    out: Path,
    *,
    block: int = 16,
    history: int = 64,
    rows: int = 512,
    steps: int = 3000,
    power: float = 0.25,
    decay: float = 0.7,
    name: str = "",
    command: str = "",
    progress: Progress | None = None,
    every: float = 20.0,
) -> tuple[Predictor, dict[str, Any]]:
    """Train on windows `ids` [n,length], on the rows of the last `rows` tokens of each, and write `out`.

    power, decay: see `Predictor`. name, command: written into the file. every: seconds between writes of the part file
    from which a killed run continues. Raises ValueError for windows that are too short."""
    for what, value in (("block", block), ("history", history), ("steps", steps)):
        check_int(what, value, 1)
    check_number("power", power, 0.01, 1.0)
    check_number("decay", decay, 0.01, 1.0)
    length, tell = ids.shape[1] // block * block, progress or (lambda *_: None)
    if rows <= history or length - rows < SINKS + RECENT + 3 * block:
        raise ValueError(
            f"windows of {ids.shape[1]} tokens are too short or too few rows: got {rows} rows of which {history} come "
            f"before the first, and at least {SINKS + RECENT + 3 * block} tokens must be in front of them"
        )
    settings = {"model": name, "block": block, "history": history, "rows": rows, "steps": steps}
    settings |= {"power": power, "decay": decay}
    settings |= {"windows": len(ids), "length": length, "text": digest(ids)}
    part = PartFile(out, settings, every)
    for w in range(part.done.get("rows", 0), len(ids)):
        part.tensors[f"rows.{w}"] = rows_of(model, ids[w, :length], rows, block).half()
        part.step("rows", w + 1)
        tell("rows of attention", w + 1, len(ids))
    data = [part.tensors[f"rows.{w}"] for w in range(len(ids))]
    predictor = _fit(part, data, Predictor.fresh(power, decay), block, history, steps, tell)
    meta = settings | {"command": command, "version": __version__}
    part.finish(lambda file: save(file, predictor, meta))
    return predictor, meta


def _fit(
    part: PartFile, data: list[Tensor], net: Predictor, block: int, history: int, steps: int, tell: Progress
) -> Predictor:
    n, length = data[0].shape[1], data[0].shape[2] * block
    weights = net.weights = {name: part.tensors.setdefault(name, x) for name, x in net.weights.items()}
    for x in weights.values():
        x.requires_grad_(True)
    adam = torch.optim.Adam(weights.values(), RATE)
    done = part.done.get("fit", 0)
    if done:
        _resume(adam, weights, part.tensors, done)
    for step in range(done, steps):
        draw = torch.Generator().manual_seed(step)
        heads = data[int(torch.randint(len(data), (), generator=draw))]
        row = int(torch.randint(history, n, (), generator=draw))
        pick = torch.randperm(len(heads), generator=draw)[:HEADS]
        seen = heads[pick, row - history : row + 1, candidates(length, n, row, block)].float()
        loss = F.mse_loss(net.next_row(seen[:, :-1]), seen[:, -1] ** net.power)
        for of in adam.param_groups:
            of["lr"] = RATE * 0.5 * (1 + math.cos(math.pi * step / steps))
        adam.zero_grad()
        loss.backward()
        adam.step()
        part.tensors.update(_moments(adam, weights))
        part.step("fit", step + 1)
        tell("network", step + 1, steps)
    return Predictor({name: x.detach() for name, x in weights.items()}, net.power, net.decay)


def _moments(adam: torch.optim.Adam, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name}.{m}": adam.state[x][m] for name, x in weights.items() for m in ("exp_avg", "exp_avg_sq")}


def _resume(adam: torch.optim.Adam, weights: dict[str, Tensor], tensors: dict[str, Tensor], done: int) -> None:
    for name, x in weights.items():
        adam.state[x] = {m: tensors[f"{name}.{m}"] for m in ("exp_avg", "exp_avg_sq")} | {
            "step": torch.tensor(float(done))
        }


@torch.no_grad()
def recall(
    model: Any,
    ids: Tensor,
    predictor: Predictor,
    meta: dict[str, Any],
    *,
    skip: int = 2,
    progress: Progress | None = None,
) -> dict[str, Tensor]:
    """How many of the k blocks that a query pays most are among the k largest of a prediction, [windows,KS] per way to
    predict: the network, the row before, the mean of the rows it sees, that of their fourth roots with less weight on
    older ones, and what the last 32 rows of the prompt paid.

    Each window is a prompt whose last GENERATED tokens count as decoded; every fourth is asked, in all layers but the
    first `skip`. Rows are true ones: nothing that was selected before changes them."""
    block, history, found = meta["block"], meta["history"], []
    length, n = ids.shape[1] // block * block, history + GENERATED
    for w, window in enumerate(ids):
        rows = rows_of(model, window[:length], n, block)
        rows = rows[skip * len(rows) // len(layers_of(model)) :]
        once = rows[:, max(0, history - 32) : history].mean(1)
        asked, sums = range(history, n, 4), {}
        for row in asked:
            at = candidates(length, n, row, block)
            seen, truth = rows[:, row - history : row, at], rows[:, row, at]
            scores = predictor.next_row(seen), seen[:, -1], seen.mean(1), Average().next_row(seen), once[:, at]
            for way, score in zip(WAYS, scores, strict=True):
                sums[way] = sums.get(way, 0) + torch.stack([hit(score, truth, k) for k in KS]) / len(asked)
        found.append(sums)
        if progress:
            progress("held-out rows", w + 1, len(ids))
    return {way: torch.stack([sums[way] for sums in found]) for way in WAYS}


def hit(score: Tensor, truth: Tensor, k: int) -> Tensor:
    """The mean fraction of the k largest of `truth` [N,blocks] among the k largest of `score`."""
    k = min(k, truth.shape[1])
    mine, theirs = (torch.zeros_like(x).scatter(1, x.topk(k, 1).indices, 1.0) for x in (score, truth))
    return (mine * theirs).sum(1).mean() / k


def table(found: dict[str, Tensor]) -> str:
    """Means over windows, and the standard deviation between them."""
    lines = [f"{'recall@k of blocks':20}" + "".join(f"{f'k={k}':>16}" for k in KS)]
    for way, x in found.items():
        spread = x.std(0) if len(x) > 1 else torch.full_like(x[0], float("nan"))
        lines.append(f"{way:20}" + "".join(f"{m:9.3f} ±{d:.3f}" for m, d in zip(x.mean(0), spread, strict=True)))
    return "\n".join([*lines, f"{len(x)} windows"])
