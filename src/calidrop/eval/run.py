"""Which samples are measured under which recipes, and what is left to do of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from calidrop.cache import KVCache
from calidrop.eval import jsonl
from calidrop.eval.cell import FULL, Job
from calidrop.eval.folder import Folder
from calidrop.eval.kit import Kit
from calidrop.eval.peers import check_peer, is_peer
from calidrop.eval.rows import Row, key_of, latest
from calidrop.eval.sample import QUESTIONS, Sample
from calidrop.eval.table import Line
from calidrop.eval.tasks import TASKS, named
from calidrop.eval.workers import How, Workers
from calidrop.models import peek
from calidrop.parts import check_int
from calidrop.recipe import parse
from calidrop.skeleton import skeleton

Tick = Callable[[str, int, int], None]
"""(what is done, rows there, rows wanted)"""


@dataclass(frozen=True)
class Ask:
    """What to measure. recipes: canonical, "full" always first. text: instead of the books that come along. chat: put
    context and question into the model's chat template. timed: the first samples of each task and length, in which each
    recipe answers alone and its speed is measured; in the others, all that share a prompt answer in one batch."""

    models: tuple[str, ...]
    recipes: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    files: tuple[Path, ...] = ()
    lengths: tuple[int, ...] = (1024,)
    samples: int = 20
    questions: tuple[str, ...] = ("seen",)
    seed: int = 0
    chat: bool = False
    text: str | None = None
    together: int = 8
    timed: int = 3

    def __post_init__(self) -> None:
        """Raises ValueError for what makes no sense."""
        if not self.tasks and not self.files:
            raise ValueError("nothing to measure: give at least one task or JSON-lines file")
        for what, values in (("model", self.models), ("recipe", self.recipes), ("question", self.questions)):
            if not values:
                raise ValueError(f"give at least one {what}")
        for question in self.questions:
            if question not in QUESTIONS:
                raise ValueError(f"question must be one of {', '.join(QUESTIONS)}, got {question!r}")
        for length in self.lengths:
            check_int("length", length, 1)
        check_int("samples", self.samples, 1)
        check_int("together", self.together, 1)
        check_int("timed", self.timed, 0)
        for name in ("models", "files", "lengths", "questions"):  # once each
            object.__setattr__(self, name, tuple(dict.fromkeys(getattr(self, name))))
        wanted = [r if is_peer(r) else str(parse(r)) for r in self.recipes]
        object.__setattr__(self, "recipes", tuple(dict.fromkeys([FULL, *wanted])))
        object.__setattr__(self, "tasks", tuple(named(self.tasks)))

    def told(self) -> dict[str, Any]:
        """For run.json."""
        return {**asdict(self), "files": [str(f) for f in self.files], "text": self.text is not None}


def samples(ask: Ask, tokenizer: Any) -> list[Sample]:
    """Raises ValueError for a file that is malformed, a text too short, a length too short for a task."""
    kit = Kit(tokenizer, ask.text, ask.seed)
    made = [
        TASKS[task].make(kit, length, i) for task in ask.tasks for length in ask.lengths for i in range(ask.samples)
    ]
    made += [s for file in ask.files for s in jsonl.load(file)]
    for s in made:
        if not s.question + s.prefix and "later" in ask.questions and s.answers:
            raise ValueError(
                f"{s.task}: sample {s.index} has its question inside the context; it cannot be asked later"
            )
    return [_in_chat(s, tokenizer) if s.question + s.prefix else s for s in made] if ask.chat else made


def _in_chat(s: Sample, tokenizer: Any) -> Sample:
    if not tokenizer.chat_template:
        raise ValueError("--chat: the tokenizer has no chat template")
    mark = "\x00"
    message = [{"role": "user", "content": mark}]
    before, after = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False).split(mark)
    return replace(s, context=before + s.context, question=s.question + after, prefix=s.prefix.lstrip())


def jobs(ask: Ask, settings: Mapping[str, Any]) -> list[Job]:
    """Every sample of every model. Raises ValueError for a recipe that does not fit a model."""
    out = []
    for model in ask.models:
        config, tokenizer = peek(model)
        empty = skeleton(config)
        for recipe in ask.recipes:
            if is_peer(recipe):
                check_peer(recipe, empty)
            else:
                KVCache(empty, recipe)
        for sample in samples(ask, tokenizer):
            for question in sample.modes(ask.questions):
                keys = {r: key_of(sample, model, r, question, settings) for r in ask.recipes}
                out.append(Job(model, sample, question, keys, ask.together, sample.index < ask.timed))
    return out


def left(jobs_: Sequence[Job], rows: Sequence[Row]) -> list[Job]:
    """What has no results yet."""
    done = {key for key, row in latest(rows).items() if row.error is None}
    asked = [replace(job, keys={r: k for r, k in job.keys.items() if k not in done}) for job in jobs_]
    return [job for job in asked if job.keys]


def settings_of(ask: Ask, how: How) -> dict[str, Any]:
    """What must be the same for all rows of a folder."""
    return {**asdict(how), "seed": ask.seed, "chat": ask.chat}


def run(
    ask: Ask, how: How, out: Path, workers: Workers, command: str, retry: int = 0, tick: Tick | None = None
) -> list[Line]:
    """Measure what is missing in the folder, and give its table. Rows with errors are tried again by the next run, and
    by this one up to `retry` times. Raises ValueError before any work for input that makes no sense."""
    check_int("retry", retry, 0)
    settings = settings_of(ask, how)
    folder, every = Folder(out, settings), jobs(ask, settings)
    folder.open(command, ask.told())
    try:
        total = sum(len(job.keys) for job in every)
        for _ in range(retry + 1):
            if not (todo := left(every, folder.rows)):
                break
            missing = sum(len(job.keys) for job in todo)
            for rows in workers(todo):
                folder.add(rows)
                missing -= len(rows)
                if tick and rows:
                    r = rows[-1]
                    tick(f"{r.task} {r.length} {r.question or ''} #{r.sample} {r.recipe}", total - missing, total)
    finally:
        table = folder.close()
    return table
