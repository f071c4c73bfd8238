"""What tasks are made with: a tokenizer's idea of length, books, and seeded draws."""

from __future__ import annotations

import random
import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import cached_property
from importlib import resources
from typing import Any

from calidrop.eval.sample import Sample

SLACK = 8  # tokens a text may grow by when its parts are joined


def shipped(name: str) -> str:
    return (resources.files("calidrop") / "data" / name).read_text("utf-8")


def offsets(tokenizer: Any, text: str) -> list[int]:
    """Where in the text each token starts."""
    told = tokenizer(text, return_offsets_mapping=True, add_special_tokens=False, verbose=False)
    return [start for start, _ in told["offset_mapping"]]


class Book:
    """A text cut into passages of so many tokens."""

    def __init__(self, tokenizer: Any, text: str, name: str):
        self.text, self.name = text, name
        self.starts = offsets(tokenizer, text)

    def passage(self, tokens: int, draw: random.Random) -> str:
        """From the start of a sentence where there is one early enough."""
        last = len(self.starts) - tokens - 1
        if last < 0:
            raise ValueError(
                f"text too short: {self.name} has {len(self.starts)} tokens, a passage of {tokens} is needed; "
                "give a longer one with --text"
            )
        at = self.starts[draw.randint(0, last)]
        sentence = re.compile(r"(?<=[.!?])\s+(?=\S)").search(self.text, at)
        if sentence and sentence.end() <= self.starts[last]:
            at = sentence.end()
        return self.text[at : self.starts[bisect_left(self.starts, at) + tokens]]


class Kit:
    """text: instead of the books that come along. Raises ValueError for a tokenizer without offsets."""

    def __init__(self, tokenizer: Any, text: str | None = None, seed: int = 0):
        if not getattr(tokenizer, "is_fast", False):
            raise ValueError(f"expected a fast tokenizer (one that tells offsets), got {type(tokenizer).__name__}")
        self.tokenizer, self.text, self.seed = tokenizer, text, seed

    def draw(self, task: str, length: int, index: int) -> random.Random:
        return random.Random(f"{task}/{length}/{index}/{self.seed}")

    def count(self, text: str) -> int:
        return len(self.tokenizer(text, verbose=False)["input_ids"])

    @cached_property
    def book(self) -> Book:
        """For predicting text: not the one that methods are trained on by default."""
        if self.text is not None:
            return Book(self.tokenizer, self.text, "the text given")
        return Book(self.tokenizer, shipped("alice.txt"), "Alice's Adventures in Wonderland")

    @cached_property
    def hay(self) -> Book:
        """For hiding something in it: both books."""
        if self.text is not None:
            return self.book
        both = shipped("alice.txt") + "\n\n" + shipped("time_machine.txt")
        return Book(self.tokenizer, both, "the two books that come along")

    def room(self, task: str, length: int, *rest: str) -> int:
        """The tokens left for filler beside the other texts of a prompt. Raises ValueError where there are none."""
        left = length - sum(map(self.count, rest)) - SLACK
        if left < 1:
            raise ValueError(f"{task}: a length of {length} tokens is too short, {length - left + 1} are needed")
        return left

    def most(self, task: str, length: int, least: int, render: Callable[[int], str], top: int | None = None) -> int:
        """The largest n, up to `top`, whose `render(n)` has at most `length` tokens. Raises ValueError if n would be
        below `least`."""
        low, high = least, 2 * least + 1
        if self.count(render(least)) > length:
            raise ValueError(
                f"{task}: a length of {length} tokens is too short, {self.count(render(least))} are needed"
            )
        while (top is None or high <= top) and self.count(render(high)) <= length:
            low, high = high, 2 * high
        high = high if top is None else min(high, top + 1)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self.count(render(middle)) <= length else (low, middle)
        return low


def hide(hay: str, needles: Sequence[str], depths: Sequence[float], ends: str = r"(?<=[.!?])\s+") -> str:
    """The text with every needle behind the sentence that ends nearest to its depth (0: in front, 1: at the end)."""
    bounds = [0, *(m.end() for m in re.finditer(ends, hay)), len(hay)]
    at = [min(bounds, key=lambda b: abs(b - depth * len(hay))) for depth in depths]
    for place, needle in sorted(zip(at, needles, strict=True), reverse=True):
        hay = hay[:place] + needle + hay[place:]
    return hay


Make = Callable[[Kit, int, int], Sample]
"""(kit, length in tokens, index of the sample) -> sample; the same arguments give the same sample."""
