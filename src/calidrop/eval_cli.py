"""`calidrop eval`: tasks under recipes, rows in a folder, a table at the end."""

from __future__ import annotations

import contextlib
import os
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from typer.core import TyperCommand

from calidrop.eval.table import MEANING, Line
from calidrop.terminal import DType, check_writable, mb, read_text, stdout

COLUMNS: tuple[tuple[str, str, Callable[[Line], str]], ...] = (
    ("recipe", "recipe", lambda r: r.recipe),
    ("N", "n", lambda r: f"{r.n}" + (f" +{r.errors} failed" if r.errors else "")),
    ("score", "score", lambda r: _score(r)),
    ("nll", "nll", lambda r: _number(r.nll, 3)),
    ("KL", "kl", lambda r: _number(r.kl, 4)),
    ("device", "device_bytes", lambda r: mb(int(r.device_bytes or 0))),
    ("host", "host_bytes", lambda r: mb(int(r.host_bytes)) if r.host_bytes else ""),
    ("ratio", "ratio", lambda r: _number(r.ratio, 1, "x")),
    ("decode", "decode_ratio", lambda r: _number(r.decode_ratio, 2, "x")),
    ("asked", "recompute_rate", lambda r: f"{r.recompute_rate or 0:.0%}"),
)  # fmt: skip


def _number(value: float | None, digits: int, unit: str = "") -> str:
    return "" if value is None else f"{value:.{digits}f}{unit}"


def _score(line: Line) -> str:
    if line.score is None:
        return ""
    return f"{line.score:.3f}" + ("" if line.low is None else f" [{line.low:.2f}, {line.high:.2f}]")


class Command(TyperCommand):
    """`--ray` alone means `--ray local`."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        out: list[str] = []
        for word, then in zip(args, [*args[1:], "--"], strict=False):
            out += [word, "local"] if word == "--ray" and then.startswith("-") else [word]
        return super().parse_args(ctx, out)


def several(values: Sequence[str] | None) -> list[str]:
    """Options given several times, or joined by commas."""
    return [word.strip() for value in values or () for word in value.split(",") if word.strip()]


def evaluate(
    recipe: Annotated[list[str] | None, typer.Option(help="Give it several times. `full` always runs.")] = None,
    task: Annotated[list[str] | None, typer.Option(help="Names, or ruler or all; joined by commas.")] = None,
    length: Annotated[list[str] | None, typer.Option(help="Tokens of a prompt, joined by commas; or 1024.")] = None,
    samples: Annotated[int, typer.Option(min=1, help="Of each task and length.")] = 20,
    question: Annotated[list[str] | None, typer.Option(help="seen (default), later, or seen,later.")] = None,
    jsonl: Annotated[list[Path] | None, typer.Option(help="Samples from a file; give it several times.")] = None,
    model: Annotated[list[str] | None, typer.Option(help="Hub id or folder; default: the embedded one.")] = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; what is there is not done again.")] = None,
    workers: Annotated[int | None, typer.Option(min=1, help="Processes here, or actors on Ray.")] = None,
    ray: Annotated[str | None, typer.Option(metavar="[ADDRESS]", help="local, auto, or HOST:PORT.")] = None,
    cpus: Annotated[float, typer.Option(min=0.0, help="CPUs of each worker on Ray.")] = 1.0,
    gpus: Annotated[float, typer.Option(min=0.0, help="GPUs of each; a fraction shares one.")] = 0.0,
    device: Annotated[str | None, typer.Option(help="Like cuda:0; default: cuda where there is one.")] = None,
    dtype: DType = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Of each worker; default: the cores, shared.")] = None,
    text: Annotated[Path | None, typer.Option(help="A text instead of the books that come along.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put prompts into the model's chat template.")] = False,
    seed: Annotated[int, typer.Option(help="Of the samples.")] = 0,
    together: Annotated[
        int, typer.Option(min=1, help="Recipes whose caches share a prefill, and are held at once.")
    ] = 8,
    timed: Annotated[int, typer.Option(min=0, help="First samples whose speed is measured; others go in batches.")] = 3,
    retry: Annotated[int, typer.Option(min=0, help="How often what failed is tried again.")] = 0,
    dump_prompts: Annotated[Path | None, typer.Option(help="Write the samples to this file, and stop.")] = None,
    list_: Annotated[bool, typer.Option("--list", help="Print the tasks, and stop.")] = False,
    table: Annotated[bool, typer.Option("--table", help="Print the table of --out, and stop.")] = False,
) -> None:
    """Measure recipes on tasks: score, nll, KL, bytes and speed. A run that was stopped goes on where it was.

    A recipe is like 'snapkv(budget=256)+calidrop', or another library's cache like transformers:DynamicCache. A
    question that is `seen` is part of the compressed prompt; `later`, it is asked of the compressed cache. Files of
    samples have the columns context, question, answer_prefix, answer, max_new_tokens, task (RULER, LongBench, LooGLE),
    one JSON object per line.
    """
    if list_:
        return print_tasks(stdout())
    if table:
        from calidrop.eval.folder import lines

        if out is None:
            raise ValueError("--table needs --out: the folder of the run")
        return print_table(stdout(), lines(out))
    from calidrop.eval.run import Ask, How, run
    from calidrop.eval.run import samples as make

    ask = Ask(
        tuple(model or ["smollm2"]), tuple(recipe or ()) or ("full",), tuple(several(task)), tuple(jsonl or ()),
        tuple(map(_length, several(length) or ["1024"])), samples, tuple(several(question) or ["seen"]), seed, chat,
        None if text is None else read_text(text), together, timed,
    )  # fmt: skip
    if dump_prompts is not None:
        return _dump(ask, dump_prompts, make)
    if not recipe or out is None:
        raise ValueError("give at least one --recipe, and --out: the run's folder")
    how = How(device, dtype, threads or max(1, (os.cpu_count() or 1) // (workers or 1)))
    with _pool(ray, how, workers, cpus, gpus) as pool, progress() as tick:
        made = run(ask, how, out, pool, shlex.join(["calidrop", *sys.argv[1:]]), retry, tick)
    print_table(stdout(), made)
    if failed := sum(line.errors for line in made):
        Console(stderr=True).print(f"{failed} rows failed: see their errors in {out}/rows.jsonl; run again to retry")
        raise typer.Exit(1)
    return None


@contextlib.contextmanager
def _pool(ray: str | None, how: Any, n: int | None, cpus: float, gpus: float) -> Iterator[Any]:
    if ray is not None:
        from calidrop.eval.ray import cluster

        with cluster(ray, how, n, cpus, gpus) as workers:
            yield workers
    else:
        from calidrop.eval.workers import here, processes

        yield here(how) if n in (None, 1) else processes(n, how)


def _length(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        raise ValueError(f"length must be a whole number of tokens, got {word!r}") from None


def _dump(ask: Any, file: Path, make: Callable[..., list]) -> None:
    from calidrop.eval.jsonl import dump
    from calidrop.models import peek

    check_writable(file)
    if len(ask.models) > 1:
        raise ValueError("--dump-prompts takes one --model: its tokenizer says how long a prompt is")
    made = make(ask, peek(ask.models[0])[1])
    dump(file, made)
    stdout().print(f"{len(made)} samples in {file}", highlight=False)


@contextlib.contextmanager
def progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on a terminal; elsewhere a line now and then, with the time that is left of this run (of several one
    behind the other, where what is done falls)."""
    console = Console(stderr=True)
    columns = BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    started = told = ticked = time.monotonic()
    first = last = -1
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("starting")

        def tick(what: str, done: int, total: int) -> None:
            nonlocal started, told, ticked, first, last
            if last < 0 or done <= last:
                first, started = done - 1, ticked
            last, ticked = done, time.monotonic()
            bar.update(task, completed=done, total=total, description=escape(what))
            if not console.is_terminal and (ticked - told > 10 or done == total):
                told = ticked
                rest = (ticked - started) / (done - first) * (total - done)
                console.print(
                    f"{done} of {total} rows, {rest / 60:.1f} min left: {what}", markup=False, highlight=False
                )

        yield tick


def print_tasks(out: Console) -> None:
    from calidrop.eval.tasks import TASKS

    table = Table("task", "group", "what", box=None, pad_edge=False)
    for name, task in TASKS.items():
        table.add_row(f"[bold]{name}[/bold]", task.group, task.about)
    out.print(table)


def print_table(out: Console, lines: Sequence[Line]) -> None:
    cells = dict.fromkeys((x.model, x.task, x.length, x.question) for x in lines)
    for cell in cells:
        here = [x for x in lines if (x.model, x.task, x.length, x.question) == cell]
        asked = "" if cell[3] is None else f", question {cell[3]}"
        out.print(f"\n[bold]{escape(cell[1])}[/bold], {cell[2]} tokens{asked}, {escape(cell[0])} ({here[0].metric})")
        table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
        for name, _, _ in COLUMNS:
            table.add_column(name, justify="left" if name == "recipe" else "right", overflow="fold")
        for line in here:
            table.add_row(*(escape(value(line)) for _, _, value in COLUMNS))
        out.print(table)
    legend = Table(box=None, pad_edge=False, show_header=False, style="dim")
    for name, field, _ in COLUMNS:
        legend.add_row(name, MEANING[field])
    out.print("", legend, sep="\n")
