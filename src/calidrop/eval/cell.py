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
from calidrop.eval.subject import Subject, fill, groups
from calidrop.eval.versions import versions

FULL = "full"


@dataclass(frozen=True)
class Job:
    """keys: those of the rows wanted, by recipe; "full" is run in any case, as the reference. together: how many
    recipes share one pass over the prompt at most."""

    model: str
    sample: Sample
    question: str | None
    keys: Mapping[str, str]
    together: int = 8

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
    queue = groups([FULL, *(r for r in job.keys if r != FULL)], job.together)
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
        for name in names:
            subject, start = subjects.pop(0), time.perf_counter()  # popped: its memory is free before the next answers
            try:
                if name != FULL and full is None:
                    raise RuntimeError("there is nothing to compare with: full failed")
                run = answer(subject, tokenizer, job.sample, later, gold if full is None else torch.tensor(full.gold))
                full = run if name == FULL else full
                if name in job.keys:
                    assert full is not None
                    row = fill_in(job.row(name), run, full, tokenizer, job.sample, len(later))
                    row.seconds = time.perf_counter() - start
                    yield stamp(row)
            except Exception as error:
                if name in job.keys:
                    yield job.failed(name, error)


@torch.inference_mode()
def answer(subject: Subject, tokenizer: Any, sample: Sample, later: Tensor, gold: Tensor) -> Run:
    """Ask `later` of the filled cache, generate, go back and force the gold answer (if empty: what was generated)."""
    first = subject.feed(later)[-1] if len(later) else subject.logits
    saved = subject.saved()
    tokens, seconds = generate(subject, tokenizer, sample, first)
    measured = subject.measured() | {
        "prefill_s": subject.prefill_s,
        "decode_ms_per_token": 1000 * median(seconds[1:]) if len(seconds) > 1 else None,
    }
    subject.restore(saved)
    gold = gold if len(gold) else torch.tensor(tokens)
    rest = subject.feed(gold[:-1].to(first.device)) if len(gold) > 1 else first[None, :][:0]
    return Run(tokens, gold.tolist(), torch.cat([first[None], rest]).float(), measured)


def generate(subject: Subject, tokenizer: Any, sample: Sample, logits: Tensor) -> tuple[list[int], list[float]]:
    """Greedily: tokens and the seconds of each step. An end token is the last; stop strings end it too."""
    ends = subject.model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    tokens, seconds = [int(logits.argmax())], []
    while len(tokens) < sample.max_new_tokens and tokens[-1] not in ends:
        if sample.stop and any(stop in tokenizer.decode(tokens) for stop in sample.stop):
            break
        start = now(logits)
        logits = subject.step(tokens[-1])
        seconds.append(now(logits) - start)
        tokens.append(int(logits.argmax()))
    return tokens, seconds


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
