"""RULER's frequent words: made-up words drawn by a zeta distribution with alpha 2, the three most frequent are asked
for (arXiv 2404.06654, section 3.3 and appendix B)."""

from __future__ import annotations

import string
from random import Random

from calidrop.eval.kit import Kit
from calidrop.eval.sample import Sample, gold_of

ALPHA = 2.0
INTRODUCTION = (
    "Read the following coded text and track the frequency of each coded word. Find the three most frequently appeared "
    "coded words. "
)
QUESTION = (
    "\nQuestion: Do not provide any explanation. Please ignore the dots '....'. What are the three most frequently "
    "appeared words in the above coded text?"
)
PREFIX = " Answer: According to the coded text above, the three most frequently appeared words are:"


def text(seed: float, words: list[str], n: int) -> str:
    """n words; the k-th most frequent occurs n / (zeta(2) k^2) times, and the first of them is dots, not asked for."""
    draw = Random(seed)
    counts = [round(n * (k + 1) ** -ALPHA / 1.6449) for k in range(len(words))]
    items = ["...."] * counts[0] + [w for w, c in zip(words, counts[1:], strict=False) for _ in range(c)]
    draw.shuffle(items)
    return INTRODUCTION + " ".join(items)


def make(kit: Kit, length: int, index: int) -> Sample:
    draw = kit.draw("fwe", length, index)
    words = ["".join(draw.choices(string.ascii_lowercase, k=6)) for _ in range(2000)]
    seed = draw.random()
    n = kit.most("fwe", length, 30, lambda n: text(seed, words, n) + QUESTION + PREFIX)
    answers = tuple(words[:3])
    return Sample("fwe", "ruler", "string_match_all", text(seed, words, n), QUESTION, PREFIX, answers,
                  gold_of(answers, PREFIX), 50, length, index)  # fmt: skip
