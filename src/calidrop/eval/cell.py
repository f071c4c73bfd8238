"""One sample measured under many recipes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timezone
from statistics import median
from typing import Any

import torch
from torch import Tensor

from calidrop.compare import divergence, nll, now
from calidrop.eval.encode import encode, until
from calidrop.eval.rows import Row, empty
from calidrop.eval.sample import Sample
from calidrop.eval.score import METRICS, score
from calidrop.eval.subject import Band, end_tokens, fill, groups, together
from calidrop.eval.versions import versions

FULL = "full"
HELD = 2**27  # logits of caches that answer side by side, at most


@dataclass(frozen=True)
class Job:
    """keys: those of the rows wanted, by recipe; "full" is run in any case, as the reference. together: how many
    recipes share one pass over the prompt at most. timed: whether they answer one by one, which times their steps, and
    not in one batch."""

    model: str
    sample: Sample
    question: str | None
    keys: Mapping[str, str]
    together: int = 8
    timed: bool = True

    def row(self, recipe: str) -> Row:
        return empty(self.sample, self.model, recipe, self.question, self.keys[recipe])

    def failed(self, recipe: str, error: BaseException | str) -> Row:
        row = self.row(recipe)
        row.error = error if isinstance(error, str) else " ".join(f"{type(error).__name__}: {error}".split())[:500]
        return stamp(row)


def stamp(row: Row) -> Row:
    row.time, row.versions = datetime.now(timezone.utc).isoformat(timespec="seconds"), versions()
    return row


@dataclass(frozen=True)
class Run:
    """tokens: generated. logits: those that predict the gold answer, fp32 [n,vocabulary]."""

    tokens: list[int]
    gold: list[int]
    logits: Tensor
    measured: dict[str, Any]


def measure(model: Any, tokenizer: Any, job: Job) -> Iterator[Row]:
    """A row for each of the job's recipes, as soon as it is there; one with an error for those that fail."""
    ids = encode(tokenizer, job.sample, job.question)
    prompt, later, gold = (torch.tensor(x, dtype=torch.long, device=model.device) for x in ids)
    queue = groups([FULL, *(r for r in job.keys if r != FULL)], together(model, job.together))
    full: Run | None = None
    while queue:
        names = queue.pop(0)
        try:
            with torch.inference_mode():
                subjects = fill(model, names, prompt)
        except Exception as error:
            if len(names) > 1:  # find out whose fault it is
                queue = [[name] for name in names] + queue
            elif names[0] in job.keys:
                yield job.failed(names[0], error)
            continue
        abreast = 1 if job.timed else max(1, HELD // (model.config.get_text_config().vocab_size * max(1, len(gold))))
        while names:
            here, names = names[:abreast], names[abreast:]
            start = time.perf_counter()
            try:
                if here[0] != FULL and full is None:
                    raise RuntimeError("there is nothing to compare with: full failed")
                band = Band(subjects[: len(here)])
                runs = answer(band, tokenizer, job.sample, later, gold if full is None else torch.tensor(full.gold))
            except Exception as error:
                if len(here) > 1:  # as above
                    queue, names = [[name] for name in here] + ([names] if names else []) + queue, []
                elif here[0] in job.keys:
                    yield job.failed(here[0], error)
                continue
            finally:
                del subjects[: len(here)]  # their memory is free before the next answer
            full = runs[0] if here[0] == FULL else full
            assert full is not None
            seconds = (time.perf_counter() - start) / len(here)
            for name, run in zip(here, runs, strict=True):
                if name in job.keys:
                    row = fill_in(job.row(name), run, full, tokenizer, job.sample, len(later))
                    row.seconds = seconds
                    yield stamp(row)


@torch.inference_mode()
def answer(band: Band, tokenizer: Any, sample: Sample, later: Tensor, gold: Tensor) -> list[Run]:
    """Ask `later` of the filled caches, generate, go back and force the gold answer (if empty: what the first
    generated)."""
    first = band.feed(later)[:, -1] if len(later) else band.logits
    saved = band.saved()
    answers, measured, seconds = generate(band, tokenizer, sample, first)
    band.restore(saved)
    gold = gold if len(gold) else torch.tensor(answers[0])
    rest = band.feed(gold[:-1].to(first.device)) if len(gold) > 1 else first[:, None][:, :0]
    logits, alone = torch.cat([first[:, None], rest], 1).float(), len(band.subjects) == 1
    times = {"decode_ms_per_token": 1000 * median(seconds[1:]) if alone and len(seconds) > 1 else None}
    return [
        Run(tokens, gold.tolist(), x, held | times | {"prefill_s": subject.prefill_s})
        for tokens, x, held, subject in zip(answers, logits, measured, band.subjects, strict=True)
    ]


def generate(
    band: Band, tokenizer: Any, sample: Sample, logits: Tensor
) -> tuple[list[list[int]], list[dict[str, Any]], list[float]]:
    """Greedily, each until an end token, which is its last, or a stop string. -> the tokens, what each cache held then,
    and the seconds of each step."""
    ends = end_tokens(band.model)
    answers: list[list[int]] = [[token] for token in logits.argmax(-1).tolist()]
    held: dict[int, dict[str, Any]] = {}
    seconds = []

    def ended(tokens: list[int]) -> bool:
        text = tokenizer.decode(tokens) if sample.stop else ""
        return len(tokens) >= sample.max_new_tokens or tokens[-1] in ends or any(stop in text for stop in sample.stop)

    while True:
        held |= {i: band.subjects[i].measured() for i, x in enumerate(answers) if i not in held and ended(x)}
        if len(held) == len(answers):
            return answers, [held[i] for i in range(len(answers))], seconds
        start = now(logits)
        logits = band.step([x[-1] for x in answers])
        seconds.append(now(logits) - start)
        for i, token in enumerate(logits.argmax(-1).tolist()):
            if i not in held:
                answers[i].append(token)


def fill_in(row: Row, run: Run, full: Run, tokenizer: Any, sample: Sample, later: int) -> Row:
    for name, value in run.measured.items():
        setattr(row, name, value)
    row.full_bytes = full.measured["full_bytes"]
    row.gold = row.gold or tokenizer.decode(full.gold, skip_special_tokens=True)
    row.answer_tokens, row.nll = len(full.gold), float(nll(run.logits, full.gold).sum())
    start = 0 if later else 1  # what predicts the first token after the prompt was attended exactly
    if len(full.gold) > start:
        compared = divergence(full.logits[start:], run.logits[start:])
        row.kl, row.kl_p95, row.agreement = compared["kl"], compared["kl_p95"], compared["agreement"]
    row.prediction = text = until(tokenizer.decode(run.tokens, skip_special_tokens=True), sample.stop)
    if sample.metric in METRICS:
        row.score = score(sample.metric, text, sample.answers, sample.classes)
    elif sample.metric == "same_start":
        same = [a == b for a, b in zip(run.tokens, full.tokens, strict=False)]
        row.score = (same.index(False) if False in same else len(same)) / len(full.tokens)
    else:
        row.score = row.agreement
    return row
