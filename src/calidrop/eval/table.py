"""What a run's rows come to, per task, length, question, model and recipe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from statistics import mean, median

from calidrop.eval.rows import Row, latest
from calidrop.eval.score import interval

Cell = tuple[str, str, int, str | None]  # model, task, length, question


@dataclass(frozen=True)
class Line:
    """n: samples with results. score with its 95 % bootstrap interval (None for less than two samples). nll: nats per
    token of the gold answers. kl, kl_p95: means over samples. ratio: uncompressed bytes / device bytes. decode_ratio:
    milliseconds per token / those of the uncompressed cache, median over samples. errors: samples without results."""

    model: str
    task: str
    group: str
    length: int
    question: str | None
    recipe: str
    metric: str
    n: int
    score: float | None = None
    low: float | None = None
    high: float | None = None
    nll: float | None = None
    kl: float | None = None
    kl_p95: float | None = None
    agreement: float | None = None
    device_bytes: float | None = None
    host_bytes: float | None = None
    ratio: float | None = None
    prefill_s: float | None = None
    decode_ms_per_token: float | None = None
    decode_ratio: float | None = None
    recompute_rate: float | None = None
    errors: int = 0


MEANING = {
    "recipe": "what the cache does",
    "n": "samples",
    "score": "of 1, with its 95 % bootstrap interval",
    "nll": "nats per token of the right answer; lower is better",
    "kl": "nats along the right answer, from the uncompressed cache",
    "agreement": "how often the likeliest token is the uncompressed cache's",
    "device_bytes": "MB (10^6 bytes) held on the device",
    "host_bytes": "the same on the host",
    "ratio": "uncompressed bytes / device bytes",
    "prefill_s": "seconds to attend and compress the prompt, mean",
    "decode_ms_per_token": "milliseconds per decoded token, median",
    "decode_ratio": "time per token / that of the uncompressed cache, median",
    "recompute_rate": "how often a head went back to evicted tokens",
}
"""Of fields, in the words of the tables that people see."""


def table(rows: Iterable[Row]) -> list[Line]:
    """In the order in which cells and recipes first came."""
    told: dict[tuple[Cell, str], list[Row]] = defaultdict(list)
    full: dict[tuple[Cell, int], Row] = {}
    for row in latest(rows).values():
        cell = row.model, row.task, row.length, row.question
        told[cell, row.recipe].append(row)
        if row.recipe == "full" and row.error is None:
            full[cell, row.sample] = row
    cells = list(dict.fromkeys(cell for cell, _ in told))
    return [_line(told[key], full) for cell in cells for key in told if key[0] == cell]


def nll_of(rows: Iterable[Row]) -> float | None:
    """Nats per token of the gold answers, over the tokens of all rows."""
    told = [(row.nll, row.answer_tokens) for row in rows if row.nll is not None and row.answer_tokens]
    return sum(nll for nll, _ in told) / sum(n for _, n in told) if told else None


def _line(rows: list[Row], full: dict[tuple[Cell, int], Row]) -> Line:
    first, good = rows[0], [row for row in rows if row.error is None]
    cell = first.model, first.task, first.length, first.question
    scores = [row.score for row in good if row.score is not None]
    low, high = interval(scores) or (None, None)
    ratios = [row.full_bytes / row.device_bytes for row in good if row.full_bytes and row.device_bytes]
    slower = [
        row.decode_ms_per_token / base.decode_ms_per_token
        for row in good
        if (base := full.get((cell, row.sample))) and row.decode_ms_per_token and base.decode_ms_per_token
    ]

    def average(name: str) -> float | None:
        values = [value for row in good if (value := getattr(row, name)) is not None]
        return mean(values) if values else None

    same = ("kl", "kl_p95", "agreement", "device_bytes", "host_bytes", "prefill_s", "recompute_rate")
    speeds = [row.decode_ms_per_token for row in good if row.decode_ms_per_token]
    return Line(
        *(first.model, first.task, first.group, first.length, first.question, first.recipe, first.metric, len(good)),
        score=mean(scores) if scores else None,
        low=low,
        high=high,
        nll=nll_of(good),
        ratio=mean(ratios) if ratios else None,
        decode_ms_per_token=median(speeds) if speeds else None,
        decode_ratio=median(slower) if slower else None,
        errors=len(rows) - len(good),
        **{name: average(name) for name in same},
    )
