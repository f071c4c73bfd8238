"""Grade school mathematics (Cobbe et al., arXiv 2110.14168), with as many solved examples in front as fit, at least
one. The solution given is the gold answer; the score looks at its number only."""

from __future__ import annotations

import json
import re
from functools import lru_cache

from calidrop.eval.kit import Kit, shipped
from calidrop.eval.sample import Sample


@lru_cache(1)
def problems() -> list[tuple[str, str]]:
    """(question, solution without the calculator's annotations)."""
    rows = [json.loads(line) for line in shipped("gsm8k.jsonl").splitlines()]
    return [(row["question"], re.sub(r"<<.*?>>", "", row["answer"])) for row in rows]


def make(kit: Kit, length: int, index: int) -> Sample:
    every = problems()
    if index >= len(every):
        raise ValueError(f"gsm8k: {len(every)} problems come along, sample {index + 1} was asked for; use --jsonl")
    question, solution = every[index]
    examples = [f"Question: {q}\nAnswer: {a}\n\n" for q, a in kit.draw("gsm8k", 0, 0).sample(every, len(every))
                if q != question]  # fmt: skip
    asked, prefix = f"Question: {question}\n", "Answer:"
    n = kit.most("gsm8k", length, 1, lambda n: "".join(examples[:n]) + asked + prefix, len(examples))
    answer = solution.rpartition("####")[2].strip()
    return Sample("gsm8k", "gsm8k", "exact_number", "".join(examples[:n]), asked, prefix, (answer,), f" {solution}",
                  256, length, index, stop=("\n\n", "Question:"))  # fmt: skip
