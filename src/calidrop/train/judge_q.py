"""Judge Q's training (arXiv 2509.10798, sec. 3): soft tokens whose attention over a prompt imitates the response's.

Each sample is a prompt with the model's own greedy response, made once. Its keys and values stay frozen, so that a step
computes the n soft tokens alone; gradients go into their embeddings and nowhere else.

Deviations: the paper's optimiser, steps and learning rate are not known; ours are Adam with a cosine schedule, from the
embeddings of random words of the responses. The loss is summed over prompt columns, as attention is about 1 / length
and its mean square would vanish. Responses come from some hundred prompts instead of 50 thousand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from calidrop import __version__
from calidrop.methods._artefact import facts, key_samples
from calidrop.methods.judge_q import SoftTokens
from calidrop.parts import check_choice, check_int, check_number
from calidrop.train._frozen import Frozen, Sample
from calidrop.train._part import PartFile
from calidrop.train._text import digest

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""


@dataclass(frozen=True)
class Options:
    """tokens: soft ones. response: tokens of each response at most. epochs: times each sample is seen. batch: samples
    per step of Adam, rate: its first. loss: see `_frozen.distance`. seed: of the first rows and the order."""

    tokens: int = 32
    response: int = 48
    epochs: int = 6
    batch: int = 2
    rate: float = 0.01
    loss: str = "mse"
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("tokens", "response", "epochs", "batch"):
            check_int(name, getattr(self, name), 1)
        check_number("rate", self.rate, 0.0)
        check_choice("loss", self.loss, ("mse", "kl"))


def train(
    model: Any,
    prompts: Sequence[list[int]],
    out: Path,
    options: Options,
    *,
    name: str = "",
    command: str = "",
    progress: Progress | None = None,
    every: float = 20.0,
) -> SoftTokens:
    """Train soft tokens on prompts (token ids) and write `out`.

    name, command: written into the file. every: seconds between writes of the part file from which a killed run
    continues. Raises ValueError for a model that cannot work.
    """
    frozen, tell = Frozen(model), progress or (lambda *_: None)
    weights = key_samples(frozen.layers)
    settings: dict[str, Any] = {"model": name, **facts(frozen.layers, frozen.decoder.config.hidden_size)}
    settings |= {**asdict(options), "samples": len(prompts), "prompts": digest(prompts), "weights": digest(weights)}
    part = PartFile(out, settings, every)
    with frozen.use():
        samples = _samples(frozen, prompts, options.response, part, tell)
        rows, losses = _descend(frozen, samples, options, part, tell)
    meta = settings | {"losses": [round(x, 6) for x in losses], "command": command, "version": __version__}
    soft = SoftTokens(meta, rows.cpu(), weights)
    part.finish(soft.save)
    return soft


def _samples(frozen: Frozen, prompts: Sequence[list[int]], most: int, part: PartFile, tell: Progress) -> list[Sample]:
    """The responses are in the part file; keys, values and targets are made again, as they are large."""
    made = []
    for i, prompt in enumerate(prompts):
        known = part.tensors.get(f"said.{i}")
        sample, said = frozen.sample(prompt, None if known is None else known.tolist(), most)
        made.append(sample)
        if known is None:
            part.tensors[f"said.{i}"] = torch.tensor(said)
            part.step("responses", i + 1)
        tell("responses", i + 1, len(prompts))
    return made


def _descend(
    frozen: Frozen, samples: list[Sample], options: Options, part: PartFile, tell: Progress
) -> tuple[Tensor, list[float]]:
    """The trained rows fp32 [n,hidden], and the mean loss of every epoch."""
    state, batch, device = part.tensors, options.batch, frozen.model.device
    order = _start(frozen, samples, options, state)
    total, done = math.ceil(len(order) / batch), part.done.get("steps", 0)
    rows = state["rows"].to(device).clone().requires_grad_()
    adam = torch.optim.Adam([rows], lr=options.rate)
    moments = {name: state[name].to(device).clone() for name in ("exp_avg", "exp_avg_sq")}
    adam.state[rows] = {"step": torch.tensor(float(done)), **moments}
    for step in range(done, total):
        adam.param_groups[0]["lr"] = options.rate * 0.5 * (1 + math.cos(math.pi * step / total))
        picked, losses = order[step * batch : (step + 1) * batch], state["losses"].clone()
        rows.grad = torch.zeros_like(rows)
        for at, i in enumerate(picked):
            with torch.enable_grad():
                loss = frozen.loss(samples[i], rows, options.loss)
                rows.grad += torch.autograd.grad(loss, rows)[0] / len(picked)
            losses[(step * batch + at) // len(samples)] += float(loss.detach()) / len(samples)
        adam.step()
        state |= {"losses": losses, "rows": rows.detach().cpu().clone()}
        state |= {name: adam.state[rows][name].cpu().clone() for name in moments}
        part.step("steps", step + 1)
        tell("soft tokens", step + 1, total)
    return rows.detach(), state["losses"].tolist()


def _start(frozen: Frozen, samples: list[Sample], options: Options, state: dict[str, Tensor]) -> list[int]:
    """The order of the samples, all epochs in a row; and in `state` what is trained, where it is not there yet."""
    draw = torch.Generator().manual_seed(options.seed)
    said = torch.cat([state[f"said.{i}"] for i in range(len(samples))])
    first = said[torch.randint(len(said), (options.tokens,), generator=draw)].to(frozen.model.device)
    state.setdefault("rows", frozen.embed(first).float().detach().cpu())
    for moment in ("exp_avg", "exp_avg_sq"):
        state.setdefault(moment, torch.zeros_like(state["rows"]))
    state.setdefault("losses", torch.zeros(options.epochs, dtype=torch.float64))
    shuffled = (torch.randperm(len(samples), generator=draw) for _ in range(options.epochs))
    return torch.cat(list(shuffled)).tolist()
