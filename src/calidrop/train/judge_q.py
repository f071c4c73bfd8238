"""Judge Q's training (arXiv 2509.10798, sec. 3): soft tokens whose attention over a prompt imitates the response's.

Each sample is a prompt with the model's own greedy response, made once. Its keys and values stay frozen, so that a step
computes the n soft tokens alone; gradients go into their embeddings and nowhere else.

Deviations: the paper's optimiser, steps and learning rate are not known; ours are Adam with a cosine schedule. The loss
is summed over prompt columns, as attention is about 1 / length and its mean square would vanish. "kl" instead compares
both as distributions over the prompt. Responses come from some hundred prompts instead of 50 thousand.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from calidrop import __version__
from calidrop.cache import layers_of
from calidrop.methods._artefact import facts, key_samples
from calidrop.methods.judge_q import Jury
from calidrop.parts import check_choice, check_int, check_number
from calidrop.plugin import ATTENTION, using
from calidrop.train._part import PartFile

Progress = Callable[[str, int, int], None]
"""(stage, done, total)"""


class Sample:
    """A prompt's keys and values, and the mean attention its response pays to it: fp16 [layers,Hq,N]."""

    def __init__(self, cache: Any, target: Tensor):
        self.target, self.length, self.cache = target.half(), target.shape[-1], _cast(cache, torch.float16)

    def prefilled(self, dtype: torch.dtype) -> Any:
        """A cache of its own to go on with."""
        return _cast(copy.deepcopy(self.cache), dtype)


def _cast(cache: Any, dtype: torch.dtype) -> Any:
    for layer in cache.layers:
        layer.keys, layer.values = layer.keys.to(dtype), layer.values.to(dtype)
    return cache


class Court:
    """A model whose weights are frozen while in use, and what is asked of it. whole: the layers that are compressed."""

    def __init__(self, model: Any):
        described = layers_of(model)
        self.model, self.decoder = model, model.get_decoder()
        self.whole = [i for i, (_, reach) in enumerate(described) if reach is None]
        self.layers = [layer for layer, reach in described if reach is None]
        if not self.layers:
            raise ValueError(
                f"judge_q: {type(model).__name__} has only layers that see a bounded window, which are not compressed"
            )
        if self.layers[0].heads.size > 1:
            raise ValueError(f"judge_q: {type(model).__name__} is spread over several processes; train on one")
        self.embed = self.decoder.get_input_embeddings()

    @contextmanager
    def frozen(self) -> Iterator[None]:
        """No weight asks for gradients; attention is transformers' own."""
        before, asked = self.model.config._attn_implementation, [(p, p.requires_grad) for p in self.model.parameters()]
        try:
            for p, _ in asked:
                p.requires_grad_(False)
            yield
        finally:
            for p, old in asked:
                p.requires_grad_(old)
            self.model.set_attn_implementation(before)

    @torch.no_grad()
    def prefill(self, prompt: list[int]) -> tuple[Any, Tensor]:
        """The cache of a prompt and the logits after it."""
        self.model.set_attn_implementation(ATTENTION)  # a plain cache, with softcap and sinks where there are some
        cache: Any = DynamicCache(config=self.model.config)
        ids = torch.tensor([prompt], device=self.model.device)
        return cache, self.model(ids, **using(cache), logits_to_keep=1).logits[0, -1]

    @torch.no_grad()
    def respond(self, cache: Any, logits: Tensor, most: int) -> list[int]:
        """The model's own greedy response, its end token included."""
        ends = self.model.generation_config.eos_token_id
        ends, said = ends if isinstance(ends, list) else [ends], []
        while len(said) < most and not (said and said[-1] in ends):
            said.append(int(logits.argmax()))
            logits = self.model(torch.tensor([said[-1:]], device=self.model.device), **using(cache)).logits[0, -1]
        return said

    def attention(self, cache: Any, embeds: Tensor, length: int) -> Tensor:
        """What tokens after the prompt pay to its `length` columns, mean over them: fp32 [layers,Hq,length]. Softmax
        over all that each of them sees: the prompt, those before it, and itself."""
        self.model.set_attn_implementation("eager")
        at = torch.arange(length, length + len(embeds), device=embeds.device)[None]
        embeds = embeds[None].to(self.embed.weight.dtype)
        out = self.decoder(inputs_embeds=embeds, position_ids=at, **using(cache), output_attentions=True)
        return torch.stack([out.attentions[i][0, :, :, :length].float().mean(1) for i in self.whole])

    @torch.no_grad()
    def sample(self, prompt: list[int], said: list[int] | None, most: int) -> tuple[Sample, list[int]]:
        """said: the response, where it is known already."""
        cache, logits = self.prefill(prompt)
        if said is None:
            said = self.respond(copy.deepcopy(cache), logits, most)
        embeds = self.embed(torch.tensor(said, device=self.model.device))
        target = self.attention(copy.deepcopy(cache), embeds, len(prompt))
        return Sample(cache, target), said

    def loss(self, sample: Sample, rows: Tensor, kind: str) -> Tensor:
        """fp32, mean over layers and heads."""
        cache = sample.prefilled(self.embed.weight.dtype)
        return distance(self.attention(cache, rows, sample.length), sample.target.float(), kind)


def distance(soft: Tensor, target: Tensor, kind: str) -> Tensor:
    """Between attention over prompt columns [...,N]: "mse", their squares summed over columns, or "kl", both made
    distributions first."""
    if kind == "mse":
        return (soft - target).square().sum(-1).mean()
    p, q = (x / x.sum(-1, keepdim=True).clamp(min=1e-9) for x in (target, soft))
    return (p * ((p + 1e-9).log() - (q + 1e-9).log())).sum(-1).mean()


def train(
    model: Any,
    prompts: Sequence[list[int]],
    out: Path,
    n: int = 32,
    *,
    response: int = 48,
    epochs: int = 8,
    batch: int = 2,
    rate: float = 0.01,
    loss: str = "mse",
    seed: int = 0,
    name: str = "",
    command: str = "",
    progress: Progress | None = None,
    every: float = 20.0,
) -> Jury:
    """Train n soft tokens and write `out`.

    response: tokens of each response at most. batch: samples per step of Adam, rate: its first. loss: see `distance`.
    name, command: written into the file. every: seconds between writes of the part file from which a killed run
    continues. Raises ValueError for a model that cannot work.
    """
    for what, value in (("tokens", n), ("response", response), ("epochs", epochs), ("batch", batch)):
        check_int(what, value, 1)
    check_number("rate", rate, 0.0)
    check_choice("loss", loss, ("mse", "kl"))
    court, tell = Court(model), progress or (lambda *_: None)
    weights = key_samples(court.layers)
    settings = {
        "model": name,
        **facts(court.layers, court.decoder.config.hidden_size),
        "tokens": n,
        "samples": len(prompts),
        "response": response,
    }
    settings |= {"epochs": epochs, "batch": batch, "rate": rate, "loss": loss, "seed": seed}
    settings |= {"prompts": _hash(json.dumps(prompts).encode()), "weights": _hash(weights.numpy().tobytes())}
    part = PartFile(out, settings, every)
    with court.frozen():
        samples = _samples(court, prompts, response, part, tell)
        rows, losses = _descend(court, samples, n, epochs, batch, rate, loss, seed, part, tell)
    meta = settings | {"losses": [round(x, 6) for x in losses], "command": command, "version": __version__}
    jury = Jury(meta, rows.cpu(), weights)
    part.finish(jury.save)
    return jury


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def _samples(court: Court, prompts: Sequence[list[int]], most: int, part: PartFile, tell: Progress) -> list[Sample]:
    """The responses are in the part file; keys, values and targets are made again, as they are large."""
    made = []
    for i, prompt in enumerate(prompts):
        known = part.tensors.get(f"said.{i}")
        sample, said = court.sample(prompt, None if known is None else known.tolist(), most)
        made.append(sample)
        if known is None:
            part.tensors[f"said.{i}"] = torch.tensor(said)
            part.step("responses", i + 1)
        tell("responses", i + 1, len(prompts))
    return made


def _descend(
    court: Court, samples: list[Sample], n: int, epochs: int, batch: int, rate: float, kind: str, seed: int,
    part: PartFile, tell: Progress,
) -> tuple[Tensor, list[float]]:  # fmt: skip
    """The trained rows fp32 [n,hidden], and the mean loss of every epoch."""
    draw = torch.Generator().manual_seed(seed)
    said = torch.cat([part.tensors[f"said.{i}"] for i in range(len(samples))])
    first = said[torch.randint(len(said), (n,), generator=draw)].to(court.model.device)  # words of responses
    order = torch.cat([torch.randperm(len(samples), generator=draw) for _ in range(epochs)]).tolist()
    state = part.tensors
    state.setdefault("rows", court.embed(first).float().detach().cpu())
    for moment in ("exp_avg", "exp_avg_sq"):
        state.setdefault(moment, torch.zeros_like(state["rows"]))
    state.setdefault("losses", torch.zeros(epochs, dtype=torch.float64))
    rows = state["rows"].to(court.model.device).clone().requires_grad_()
    adam = torch.optim.Adam([rows], lr=rate)
    total, done = math.ceil(len(order) / batch), part.done.get("steps", 0)
    kept = {moment: state[moment].to(rows.device).clone() for moment in ("exp_avg", "exp_avg_sq")}
    adam.state[rows] = {"step": torch.tensor(float(done)), **kept}
    for step in range(done, total):
        adam.param_groups[0]["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / total))
        rows.grad = torch.zeros_like(rows)
        picked = order[step * batch : (step + 1) * batch]
        losses = state["losses"].clone()
        for at, i in enumerate(picked):
            with torch.enable_grad():
                loss = court.loss(samples[i], rows, kind)
                rows.grad += torch.autograd.grad(loss, rows)[0] / len(picked)
            losses[(step * batch + at) // len(samples)] += float(loss.detach()) / len(samples)
        adam.step()
        state["losses"], state["rows"] = losses, rows.detach().cpu().clone()
        state |= {moment: adam.state[rows][moment].cpu().clone() for moment in ("exp_avg", "exp_avg_sq")}
        part.step("steps", step + 1)
        tell("soft tokens", step + 1, total)
    return rows.detach(), state["losses"].tolist()
