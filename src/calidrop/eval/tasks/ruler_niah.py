"""RULER's eight needle tasks (Hsieh et al., arXiv 2404.06654, section 3.1 and appendix B).

Deviations: books are the haystack instead of essays, names come from other word lists, and no more tokens are generated
than the answers need, where RULER generates 128.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from random import Random

from calidrop.eval.kit import Kit, Make, hide
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks._words import identifier, number, pairs

NOISE = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again.\n"


@dataclass(frozen=True)
class Variant:
    """hay: "noise", "book", or "needles" like the ones asked for. keys: needles in a hay that has few. asked: how many
    keys are asked for. values: how many each has. names, answers: "words", "numbers" or "uuids"."""

    hay: str
    names: str = "words"
    answers: str = "numbers"
    keys: int = 1
    asked: int = 1
    values: int = 1


VARIANTS = {
    "niah_single_1": Variant("noise"),
    "niah_single_2": Variant("book"),
    "niah_single_3": Variant("book", answers="uuids"),
    "niah_multikey_1": Variant("book", keys=4),
    "niah_multikey_2": Variant("needles"),
    "niah_multikey_3": Variant("needles", names="uuids", answers="uuids"),
    "niah_multivalue": Variant("book", values=4),
    "niah_multiquery": Variant("book", keys=4, asked=4),
}


def names(kind: str, draw: Random, n: int) -> list[str]:
    return pairs(draw, n) if kind == "words" else [(identifier if kind == "uuids" else number)(draw) for _ in range(n)]


def maker(task: str) -> Make:
    v = VARIANTS[task]

    def make(kit: Kit, length: int, index: int) -> Sample:
        draw = kit.draw(task, length, index)
        n = max(2, length // 16) if v.hay == "needles" else v.keys  # no needle has less than 16 tokens
        keys = names(v.names, draw, n)
        values = [names(v.answers, draw, v.values) for _ in keys]
        needles = [[f"One of the special magic {v.answers} for {k} is: {x}.\n" for x in xs]
                   for k, xs in zip(keys, values, strict=True)]  # fmt: skip
        target, question, prefix = ask(v, keys)
        answers = tuple(x for xs in values[: v.asked] for x in xs)
        depths = [draw.random() for _ in range(n * v.values)]

        def context(size: int) -> str:
            """`size`: of the hay, in tokens, lines or needles."""
            few = [x for xs in needles for x in xs]
            if v.hay == "needles":
                line = few[1:size]
                line.insert(int(depths[0] * size), few[0])
                return target + "".join(line)
            hay = kit.hay.passage(size, Random(index)) if v.hay == "book" else NOISE * size
            return target + hide(hay, few, depths)

        if v.hay == "book":
            size = kit.room(task, length, target, question, prefix, *(x for xs in needles for x in xs))
        else:
            size = kit.most(task, length, 2, lambda size: context(size) + question + prefix)
        gold = gold_of(answers, prefix)
        return Sample(task, "ruler", "string_match_all", context(size), question, prefix, answers, gold,
                      kit.count(gold) + 8, length, index, depths[0] if len(answers) == 1 else None)  # fmt: skip

    return make


def ask(v: Variant, keys: list[str]) -> tuple[str, str, str]:
    """Introduction, question, answer prefix."""
    one = v.asked * v.values == 1
    kind = v.answers.removesuffix("s") if one else v.answers
    names = keys[0] if v.asked == 1 else ", ".join(keys[: v.asked - 1]) + ", and " + keys[v.asked - 1]
    start = f"A special magic {kind} is" if one else f"Some special magic {kind} are"
    what, verb = ("What is", "is") if one else ("What are all", "are")
    return (
        f"{start} hidden within the following text. Make sure to memorize it. I will quiz you about the {kind} "
        "afterwards.\n",
        f"\n{what} the special magic {kind} for {names} mentioned in the provided text?",
        f" The special magic {kind} for {names} mentioned in the provided text {verb}",
    )


MAKERS: dict[str, Callable[[Kit, int, int], Sample]] = {task: maker(task) for task in VARIANTS}
