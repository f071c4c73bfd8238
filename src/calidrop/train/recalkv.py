"""ReCalKV's training (Yan et al., arXiv 2505.24357, sec. 3): low-rank bases of a model's keys and values.

Three passes over calibration windows: second moments of keys and values; gradients, whose squares (Fisher information)
set the ranks; and values once more, layer by layer, on inputs that went through the layers already compressed.

Deviations: CKA compares the heads' centred keys on the calibration windows, not rows of whitened weights, since their
centring depends on the root. Groups of heads are the largest up to four that divide the kv heads evenly; with grouped
queries there are few. Ranks are multiples of 8 (32 when all heads together have more than 512 dims) instead of 32.
Calibration defaults to 32 windows of a book instead of 256 of wikitext2.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calidrop import __version__
from calidrop.methods._latents import Artefact, Basis
from calidrop.parts import check_int, check_number
from calidrop.train import _lowrank as lowrank
from calidrop.train._part import PartFile
from calidrop.train._run import Run
from calidrop.train._text import digest

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""

GROUP = 4  # kv heads whose keys share a basis, at most


def train(
    model: Any,
    ids: Tensor,
    out: Path,
    keep: float = 0.5,
    *,
    name: str = "",
    command: str = "",
    fisher: int = 8,
    multiple: int | None = None,
    progress: Progress | None = None,
    every: float = 20.0,
) -> Artefact:
    """Train on windows `ids` [n,length] and write `out`.

    keep: the fraction of all ranks. fisher: how many windows give gradients. multiple: ranks are multiples of it (None:
    see above). name, command: written into the file. every: seconds between writes of the part file from which a killed
    run continues. Raises ValueError for a model whose cached keys are not its rotated key projections.
    """
    check_number("keep", keep, 0.0, 1.0)
    check_int("fisher", fisher, 1)
    if multiple is not None:
        check_int("multiple", multiple, 1)
    run, tell, fisher = Run(model, ids), progress or (lambda *_: None), min(fisher, len(ids))
    settings = {"model": name, **run.facts(), "keep": keep, "multiple": multiple, "fisher": fisher}
    settings |= {"windows": len(ids), "length": ids.shape[1], "text": digest(ids), "weights": digest(run.samples())}
    steps = _steps(run, multiple)
    lowrank.allocate([1.0] * len(steps), run.heads * run.dim, keep, steps)  # for its error, before any work
    part = PartFile(out, settings, every)
    moments, mean = _moments(run, part, tell)
    ranks = lowrank.allocate(_fisher(run, part, fisher, tell), run.heads * run.dim, keep, steps)
    bases = _bases(run, moments, mean, ranks)
    bases = _values(run, part, bases, tell)
    lost = [[round(x, 5) for x in pair] for pair in _lost(moments, bases)]
    pairs = [ranks[i : i + 2] for i in range(0, len(ranks), 2)]
    meta = settings | {"ranks": pairs, "lost": lost, "command": command, "version": __version__}
    artefact = Artefact(meta, bases, run.rope, run.samples())
    part.finish(artefact.save)
    return artefact


@torch.no_grad()
def _moments(run: Run, part: PartFile, tell: Progress) -> tuple[Tensor, Tensor]:
    """Second moments of keys and values without their biases, fp64 [layers,2,H*D,H*D], and mean keys [layers,H*D], all
    before the rotary embedding."""
    layers, D, n = len(run.whole), run.heads * run.dim, len(run.ids)
    both = part.tensors.setdefault("moments", torch.zeros(layers, 2, D, D, dtype=torch.float64))
    mean = part.tensors.setdefault("mean", torch.zeros(layers, D, dtype=torch.float64))
    biases = [run.biases(at) for at in range(layers)]

    def see(at: int, which: int, y: Tensor) -> None:
        y = y[0].float() - biases[at][which].to(y.device)
        both[at, which] += (y.T @ y).cpu().double()
        if which == 0:
            mean[at] += y.sum(0).cpu().double()

    with run.watched(see):
        for w in range(part.done.get("moments", 0), n):
            run.forward(w)
            part.step("moments", w + 1)
            tell("keys and values", w + 1, n)
    return both / run.ids.numel(), mean / run.ids.numel()


def _fisher(run: Run, part: PartFile, n: int, tell: Progress) -> list[float]:
    """Per projection (keys and values of each layer in turn): the mean over its weights of the root of their mean
    squared gradient."""
    weights: list[Tensor] = [p.weight for at in range(len(run.whole)) for p in run.projections(at)]
    total = part.tensors.setdefault("gradients", torch.zeros(len(weights), *weights[0].shape))
    asked = [(p, p.requires_grad) for p in run.model.parameters()]
    try:
        for p, _ in asked:
            p.requires_grad_(False)
        for weight in weights:
            weight.requires_grad_(True)
        for w in range(part.done.get("fisher", 0), n):
            ids = run.ids[w * len(run.ids) // n][None].to(run.model.device)
            with torch.enable_grad():
                loss = run.model(input_ids=ids, labels=ids, use_cache=False).loss
                grads = torch.autograd.grad(loss, weights)
            for one, g in zip(total, grads, strict=True):
                one += g.float().square().cpu()
            part.step("fisher", w + 1)
            tell("gradients", w + 1, n)
    finally:
        for p, before in asked:
            p.requires_grad_(before)
    return (total / n).sqrt().mean((1, 2)).tolist()


def _steps(run: Run, multiple: int | None) -> list[int]:
    """What the ranks are multiples of, for keys and values of each layer in turn: those of keys are split over groups
    of heads."""
    step = multiple or (8 if run.heads * run.dim <= 512 else 32)
    return [math.lcm(step, run.heads // lowrank.group_size(run.heads, GROUP)), step] * len(run.whole)


def _bases(run: Run, moments: Tensor, mean: Tensor, ranks: list[int]) -> list[Basis]:
    """The bases that the uncompressed model's moments give. ranks: of keys and values of each layer in turn."""
    size, made = lowrank.group_size(run.heads, GROUP), []
    for at, (keys, values) in enumerate(moments):
        covariance = keys - torch.outer(mean[at], mean[at])
        order = lowrank.grouped_order(lowrank.similarity(covariance, run.heads), size)
        k = lowrank.group_bases(keys, order, size, ranks[2 * at]).float()
        v = lowrank.basis(values, ranks[2 * at + 1]).float()
        made.append(Basis(order, k, v, *run.biases(at)))
    return made


@torch.no_grad()
def _values(run: Run, part: PartFile, bases: list[Basis], tell: Progress) -> list[Basis]:
    """The bases with those of values adapted to inputs from compressed layers."""
    bases, done, layers, n = list(bases), part.done.get("values", 0), len(run.blocks), len(run.ids)
    if "hidden" not in part.tensors:
        part.tensors["hidden"] = run.embedded()
    calls = run.calls()
    for i in range(layers):
        hidden, at = part.tensors["hidden"], run.whole.index(i) if i in run.whole else None
        if at is not None:
            old = bases[at]
            if i >= done:
                moments = run.value_moments(at, hidden, calls[i])
                part.tensors[f"values.{at}"] = lowrank.alternate(old.values.double(), moments).float()
            bases[at] = Basis(old.order, old.keys, part.tensors[f"values.{at}"], old.key_bias, old.value_bias)
        if i >= done:
            after = []
            for y in run.through(i, hidden, calls[i], None if at is None else bases[at]):
                after.append(y)
                tell("compressed layers", i * n + len(after), layers * n)
            part.tensors["hidden"] = torch.cat(after)
            part.step("values", i + 1)
    return bases


def _lost(moments: Tensor, bases: list[Basis]) -> Iterator[tuple[float, float]]:
    """Per layer, the fraction of the calibration keys' and values' squares that the bases miss."""
    for (keys, values), basis in zip(moments, bases, strict=True):
        eye = torch.eye(len(keys)).view(1, len(keys), basis.heads, -1).transpose(1, 2)  # codes to the basis itself
        plain = Basis(basis.order, basis.keys, basis.values, *(torch.zeros_like(b) for b in (basis.key_bias,) * 2))
        yield lowrank.lost(keys, plain.code_keys(eye)[0].double()), lowrank.lost(values, basis.values.double())
