"""A pass key among sentences that repeat (Mohtashami and Jaggi, arXiv 2305.16300; the wording of LongChat and KIVI)."""

from __future__ import annotations

from calidrop.eval.kit import Kit
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks._words import number
from calidrop.eval.tasks.needle import DEPTHS

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. I will quiz you about "
    "the important information there.\n"
)
NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"
QUESTION = "What is the pass key?"
PREFIX = " The pass key is"


def make(kit: Kit, length: int, index: int) -> Sample:
    draw, depth = kit.draw("passkey", length, index), DEPTHS[index % len(DEPTHS)]
    key = number(draw, 5)
    needle = f"The pass key is {key}. Remember it. {key} is the pass key.\n"

    def context(n: int) -> str:
        before = round(depth * n)
        return INTRODUCTION + NOISE * before + needle + NOISE * (n - before)

    n = kit.most("passkey", length, 1, lambda n: context(n) + QUESTION + PREFIX)
    return Sample("passkey", "passkey", "string_match_all", context(n), QUESTION, PREFIX, (key,),
                  gold_of((key,), PREFIX), 16, length, index, depth)  # fmt: skip
