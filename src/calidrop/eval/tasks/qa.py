"""Extractive question answering: a paragraph about someone who does not exist, hidden in a book. The answer prefix
starts the sentence, so that small models too know what is wanted; the nll of the answer tells more than its words."""

from __future__ import annotations

from calidrop.eval.kit import Kit, hide
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks._people import people
from calidrop.eval.tasks.needle import DEPTHS


def make(kit: Kit, length: int, index: int) -> Sample:
    draw, depth = kit.draw("qa", length, index), DEPTHS[index % len(DEPTHS)]
    (one,) = people(draw, 1)
    question, prefix, answer = [
        (f"In which town was {one.name} born?", f"{one.name} was born in the town of", one.town),
        (f"In which year was {one.name} born?", f"{one.name} was born in the year", str(one.year)),
        (f"What did {one.name} learn to be?", f"{one.name} was an apprentice as a", one.trade),
        (f"What did {one.name} write about?", f"{one.name} wrote a long book about", one.topic),
        (f"On which river does {one.town} lie?", f"{one.town} lies on the river", one.river),
    ][draw.randrange(5)]
    question, prefix = f"\n\nQuestion: {question}\nAnswer:", f" {prefix}"
    needle = f"\n\n{one.life()} {one.home()}\n\n"
    hay = kit.hay.passage(kit.room("qa", length, needle, question, prefix), draw)
    return Sample("qa", "qa", "f1", hide(hay, [needle], [depth]), question, prefix, (answer,),
                  gold_of((answer,), prefix), 16, length, index, depth, stop=(".", "\n", ","))  # fmt: skip
