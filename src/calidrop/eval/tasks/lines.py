"""LongEval's lines: the number that a named line holds (LongChat, lmsys.org/blog/2023-06-29-longchat)."""

from __future__ import annotations

from calidrop.eval.kit import Kit
from calidrop.eval.sample import Sample
from calidrop.eval.tasks._words import number, pairs

INTRODUCTION = (
    "Below is a record of lines I want you to remember. Each line begins with 'line <line index>' and contains a "
    "'<REGISTER_CONTENT>' at the end of the line as a numerical value. For each line index, memorize its "
    "corresponding <REGISTER_CONTENT>. At the end of the record, I will ask you to retrieve the corresponding "
    "<REGISTER_CONTENT> of a certain line index. Now the record start:\n\n"
)


def make(kit: Kit, length: int, index: int) -> Sample:
    draw = kit.draw("lines", length, index)
    names = pairs(draw, min(length, 30000))
    values = [number(draw, 5) for _ in names]
    place = draw.random()

    def parts(n: int) -> tuple[str, str, str]:
        name = names[int(place * n)]
        lines = "".join(f"line {names[i]}: REGISTER_CONTENT is <{values[i]}>\n" for i in range(n))
        question = (
            f"\nNow the record is over. Tell me what is the <REGISTER_CONTENT> in line {name}? I need the number."
        )
        return INTRODUCTION + lines, question, f" The <REGISTER_CONTENT> in line {name} is <"

    n = kit.most("lines", length, 2, lambda n: "".join(parts(n)))
    context, question, prefix = parts(n)
    answer = values[int(place * n)]
    return Sample("lines", "longeval", "first_number", context, question, prefix, (answer,), answer, 12, length, index,
                  int(place * n) / max(1, n - 1))  # fmt: skip
