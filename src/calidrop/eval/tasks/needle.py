"""A sentence with a number, hidden in a book: depth by length."""

from __future__ import annotations

from calidrop.eval.kit import Kit, hide
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks._words import number

DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)
"""Of sample 0, 1, ...: over again after the last."""
QUESTION = "\n\nQuestion: What is the magic number?\nAnswer:"
PREFIX = " The magic number is"


def make(kit: Kit, length: int, index: int) -> Sample:
    draw, depth = kit.draw("needle", length, index), DEPTHS[index % len(DEPTHS)]
    answer = number(draw, 5)
    needle = f" The magic number is {answer}. "
    hay = kit.hay.passage(kit.room("needle", length, needle, QUESTION, PREFIX), draw)
    return Sample("needle", "needle", "string_match_all", hide(hay, [needle], [depth]), QUESTION, PREFIX, (answer,),
                  gold_of((answer,), PREFIX), 8, length, index, depth)  # fmt: skip
