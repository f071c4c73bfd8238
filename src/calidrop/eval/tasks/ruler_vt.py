"""RULER's variable tracking: one chain of four hops among repeated sentences, after one example of the same kind
(arXiv 2404.06654, section 3.2 and appendix B)."""

from __future__ import annotations

import string
from random import Random

from calidrop.eval.kit import Kit, hide
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks.ruler_niah import NOISE

HOPS = 4


def chain(draw: Random) -> tuple[str, list[str], list[str]]:
    """The value, the variables, and the assignments in their order."""
    value, variables = str(draw.randint(10000, 99999)), []
    while len(variables) <= HOPS:
        variable = "".join(draw.choices(string.ascii_uppercase, k=5))
        variables += [variable] if variable not in variables else []
    sources = [value, *(f"VAR {v}" for v in variables)]
    return value, variables, [f"VAR {v} = {source}\n" for v, source in zip(variables, sources, strict=False)]


def problem(draw: Random, lines: int, depths: list[float], chained: tuple[str, list[str], list[str]]) -> list[str]:
    """Context, question, answer prefix."""
    value, variables, assignments = chained
    text = hide(NOISE * lines, assignments, depths, ends=r"\n")
    return [
        f"Memorize and track the chain(s) of variable assignment hidden in the following text.\n\n{text}",
        f"Question: Find all variables that are assigned the value {value} in the text above.",
        f" Answer: According to the chain(s) of variable assignment in the text above, {len(variables)} variables are "
        f"assigned the value {value}, they are: ",
    ]


def make(kit: Kit, length: int, index: int) -> Sample:
    draw = kit.draw("vt", length, index)
    shown, chained = chain(draw), chain(draw)
    places = [sorted(draw.random() for _ in range(HOPS + 1)) for _ in range(2)]
    example = "".join(problem(draw, 5, places[0], shown)) + " ".join(shown[1]) + "\n\n"

    def parts(n: int) -> list[str]:
        context, *rest = problem(draw, n, places[1], chained)
        return [example + context, *rest]

    context, question, prefix = parts(kit.most("vt", length, 1, lambda n: "".join(parts(n))))
    answers = tuple(chained[1])
    return Sample("vt", "ruler", "string_match_all", context, question, prefix, answers,
                  gold_of((" ".join(answers),), prefix), 30, length, index)  # fmt: skip
