"""Greedy generation with a recipe, timed."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

from torch import Tensor
from transformers import TextStreamer

from calidrop.cache import KVCache
from calidrop.compare import Progress, prefill_progress
from calidrop.parts import Part, check_int
from calidrop.plugin import using
from calidrop.recipe import Recipe


@dataclass(frozen=True)
class Generated:
    """text: without the prompt and special tokens. tokens: the new ids, an end token included. cache: as the last step
    left it; it holds the prompt and all new tokens but the last. prefill_s: the prompt, attended and compressed.
    decode_ms_per_token: the median step; NaN where one token was all."""

    text: str
    tokens: list[int]
    cache: KVCache
    prefill_s: float
    decode_ms_per_token: float


def generate(
    model: Any,
    tokenizer: Any,
    prompt: str,
    recipe: str | Part | Recipe = "full",
    max_new_tokens: int = 64,
    on_token: Callable[[str], None] | None = None,
    progress: Progress | None = None,
) -> Generated:
    """Continue `prompt` as it is (no chat template), greedily, until an end token or `max_new_tokens`.

    on_token: called once per new token with the text that became final, often "" (a word is final when the next one
    begins), and once more with what was left at the end. progress: called per layer of the prefill and per token.
    Raises ValueError for an empty prompt, max_new_tokens below 1, or a recipe that makes no sense or does not fit.
    """
    check_int("max_new_tokens", max_new_tokens, 1)
    inputs = tokenizer(prompt, return_tensors="pt", verbose=False)
    length = inputs["input_ids"].shape[-1]
    if length == 0:
        raise ValueError("empty prompt: expected at least one token")
    cache = KVCache(model, recipe, eager=True)
    streamer = _Stream(tokenizer, cache, max_new_tokens, on_token, progress)
    with prefill_progress(model, cache, max_new_tokens, streamer.layer if progress else None):
        ids = model.generate(
            input_ids=inputs["input_ids"].to(model.device),
            attention_mask=inputs["attention_mask"].to(model.device),
            **using(cache),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            streamer=streamer,
        )
    tokens = ids[0, length:].tolist()
    start, first, *later = streamer.times
    steps = [b - a for a, b in zip([first, *later], later, strict=False)]
    ms = 1000 * median(steps) if steps else float("nan")
    return Generated(tokenizer.decode(tokens, skip_special_tokens=True), tokens, cache, first - start, ms)


class _Stream(TextStreamer):
    """Notes when the prompt and each token came, and passes finished text on."""

    def __init__(
        self,
        tokenizer: Any,
        cache: KVCache,
        max_new_tokens: int,
        on_token: Callable[[str], None] | None,
        progress: Progress | None,
    ):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_token, self.progress = on_token, progress
        self.name, self.layers, self.max_new_tokens = str(cache.recipe), len(cache.layers), max_new_tokens
        self.times: list[float] = []  # the prompt's, then each token's
        self.ready = ""

    def layer(self, recipe: str, done: int, total: int) -> None:
        """Layers of the prefill only: those of later steps would make the bar jump back."""
        if self.progress and len(self.times) == 1:
            self.progress(recipe, done, total)

    def put(self, value: Tensor) -> None:
        self.times.append(time.perf_counter())
        super().put(value)
        tokens = len(self.times) - 1
        if tokens and self.progress:
            self.progress(self.name, self.layers + tokens, self.layers + self.max_new_tokens)
        if tokens:
            self._pass_on()

    def end(self) -> None:
        super().end()
        self._pass_on()

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        self.ready += text

    def _pass_on(self) -> None:
        text, self.ready = self.ready, ""
        if self.on_token:
            self.on_token(text)
