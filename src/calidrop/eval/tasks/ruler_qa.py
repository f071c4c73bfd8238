"""RULER's question answering: the documents that answer, among others (arXiv 2404.06654, section 3.4 and appendix B).

Deviation: documents about people and towns that do not exist, instead of SQuAD (qa_1) and HotpotQA (qa_2: two documents
must be joined). Beyond the 240 people there are, passages of books fill up.
"""

from __future__ import annotations

from random import Random

from calidrop.eval.kit import Kit, Make
from calidrop.eval.sample import Sample, gold_of
from calidrop.eval.tasks._people import people

ASK = "Answer the question based on the given documents. Only give me the answer and do not output any other words."
PREFIX = " Answer:"


def maker(task: str) -> Make:
    def make(kit: Kit, length: int, index: int) -> Sample:
        draw = kit.draw(task, length, index)
        crowd = people(draw, 240)
        asked, seed = crowd[0], draw.random()
        needed = [asked.life()] + ([asked.home()] if task == "qa_2" else [])
        other = [text for p in crowd[1:] for text in (p.life(), p.home())]
        other += [kit.hay.passage(100, draw) for _ in range(length // 100)] if length > 12000 else []
        answer = asked.town if task == "qa_1" else asked.river
        where = f"In which town was {asked.name} born" if task == "qa_1" else (
            f"On which river does the town lie where {asked.name} was born")  # fmt: skip
        question = f"\n\n{ASK}\n\nQuestion: {where}?"

        def context(n: int) -> str:
            documents = needed + other[:n]
            Random(seed).shuffle(documents)
            told = "\n\n".join(f"Document {i}:\n{text}" for i, text in enumerate(documents, 1))
            return f"{ASK}\n\nThe following are given documents.\n\n{told}"

        n = kit.most(task, length, 1, lambda n: context(n) + question + PREFIX)
        return Sample(task, "ruler", "string_match_any", context(n), question, PREFIX, (answer,),
                      gold_of((answer,), PREFIX), 32, length, index)  # fmt: skip

    return make


MAKERS: dict[str, Make] = {task: maker(task) for task in ("qa_1", "qa_2")}
