"""One question about one context."""

from __future__ import annotations

from dataclasses import dataclass

QUESTIONS = ("seen", "later")
"""Whether the question is in the prompt that is compressed, or is asked of the compressed cache."""


@dataclass(frozen=True)
class Sample:
    """The prompt is context + question + prefix, joined as they are; the answer comes right after it.

    task, group: names; a group is a family of tasks, like "ruler". metric: one of `score.METRICS` or `MEASURED`.
    answers: what the metric compares with. gold: the text whose nll is measured; "" means what the uncompressed cache
    generates itself. length: the tokens asked for, nearly those of the prompt. index: which of the samples of its kind.
    depth: where in the context the answer is, 0 to 1, if it is at one place. stop: what ends the answer, besides an end
    token. classes: the labels a classification chooses from. question is "" where there is nothing to ask.
    """

    task: str
    group: str
    metric: str
    context: str
    question: str
    prefix: str
    answers: tuple[str, ...]
    gold: str
    max_new_tokens: int
    length: int
    index: int
    depth: float | None = None
    stop: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()

    def modes(self, asked: tuple[str, ...]) -> tuple[str | None, ...]:
        """Of the question modes asked for, those that differ: without a question there is only one, None."""
        return asked if self.question + self.prefix else (None,)


def gold_of(answers: tuple[str, ...], before: str) -> str:
    """The answers as text to put behind `before`: parted from it by one space."""
    return ("" if before[-1:].isspace() else " ") + ", ".join(answers)
