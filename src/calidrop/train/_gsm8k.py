"""Grade-school sums as training data: the rows that come with the package, and a reward that can be checked."""

from __future__ import annotations

import re
from importlib import resources
from pathlib import Path
from typing import Any

from calidrop.train._text import read_rows

Row = dict[str, str]
NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
STEP = re.compile(r"<<[^>]*=([^>]*)>>")  # a calculation in a reference answer, and its result


def rows(file: Path | None) -> list[Row]:
    """{"question", "answer"} per line; None: 200 of GSM8K's training rows."""
    source = resources.files("calidrop") / "data" / "gsm8k_train_200.jsonl" if file is None else file
    return read_rows(source.read_text("utf-8"), str(source), "question", "answer")


def check_answers(data: list[Row]) -> None:
    """Raises ValueError for an answer that no reward can be checked by."""
    for i, row in enumerate(data):
        if not numbers(row["answer"]):
            raise ValueError(f"row {i + 1}: an answer must hold a number, got {row['answer'][:60]!r}")


def asked(row: Row) -> list[dict[str, str]]:
    return [{"role": "user", "content": row["question"]}]


def answered(row: Row) -> list[dict[str, str]]:
    """The reference answer without its calculator marks."""
    return [{"role": "assistant", "content": re.sub(r"<<[^>]*>>", "", row["answer"])}]


def numbers(text: str) -> list[float]:
    return [float(x.replace(",", "")) for x in NUMBER.findall(text)]


def score(text: str, answer: str) -> float:
    """1 when the last number is the reference's (which follows ####), else half the fraction of the reference's
    intermediate results that the text mentions."""
    found, (*_, final) = numbers(text), numbers(answer)
    if found and found[-1] == final:
        return 1.0
    steps = {x for step in STEP.findall(answer) for x in numbers(step)}
    return 0.5 * len(steps & set(found)) / len(steps) if steps else 0.0


def reward(completions: list[Any], answer: list[str], **kwargs: Any) -> list[float]:
    """As GRPO asks for it."""
    texts = (c if isinstance(c, str) else c[0]["content"] for c in completions)
    return [score(text, reference) for text, reference in zip(texts, answer, strict=True)]
