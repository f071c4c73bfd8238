"""What a model's responses attend to, and what soft tokens behind a prompt do, side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from calidrop.cache import layers_of
from calidrop.plugin import ATTENTION, using
from calidrop.support import check_plain


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


class Frozen:
    """A model whose weights are frozen while in use, and what is asked of it. whole: the layers that are compressed."""

    def __init__(self, model: Any):
        check_plain(model, "judge_q")
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
    def use(self) -> Iterator[None]:
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
