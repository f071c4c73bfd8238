"""RULER's common words: ten words occur 30 times, the others three times; after one smaller example
(arXiv 2404.06654, section 3.3 and appendix B). Below 4096 tokens, which ten words 30 times nearly fill, it is six times
and once."""

from __future__ import annotations

from random import Random

from calidrop.eval.kit import Kit
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks._words import lists

COMMON = 10
QUESTION = f"\nQuestion: What are the {COMMON} most common words in the above list?"
PREFIX = f" Answer: The top {COMMON} words that appear most often in the list are:"


def listed(draw: Random, words: list[str], rare: int, often: int, seldom: int) -> str:
    """A numbered list of the first ten words `often` times and `rare` others `seldom` times."""
    items = words[:COMMON] * often + words[COMMON : COMMON + rare] * seldom
    draw.shuffle(items)
    told = " ".join(f"{i}. {word}" for i, word in enumerate(items, 1))
    return (
        "Below is a numbered list of words. In these words, some appear more often than others. Memorize the ones that "
        f"appear most often.\n{told}"
    )


def answer(words: list[str]) -> str:
    return " ".join(f"{i}. {word}" for i, word in enumerate(words[:COMMON], 1))


def make(kit: Kit, length: int, index: int) -> Sample:
    draw = kit.draw("cwe", length, index)
    singles, long = lists()["adjectives"] + lists()["nouns"], length >= 4096
    pool = draw.sample(singles, len(singles))  # then words of two words, as many as are wanted
    shown, words = pool[:30], pool[30:] + [f"{a}{b}" for a in pool[:184] for b in pool[184:]]
    example = (
        listed(draw, shown, 10, 10 if long else 3, 3 if long else 1) + QUESTION + PREFIX + " " + answer(shown) + "\n"
    )
    seed, often, seldom = draw.random(), 30 if long else 6, 3 if long else 1

    def context(rare: int) -> str:
        return example + listed(Random(seed), words, rare, often, seldom)

    n = kit.most("cwe", length, 1, lambda rare: context(rare) + QUESTION + PREFIX)
    answers = tuple(words[:COMMON])
    return Sample("cwe", "ruler", "string_match_all", context(n), QUESTION, PREFIX, answers,
                  gold_of((answer(words),), PREFIX), 120, length, index)  # fmt: skip
