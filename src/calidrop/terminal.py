"""What the commands have in common: options, errors as one line, progress bars, the table of measurements. Whatever
imports torch is imported inside a function, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text
from typer.core import TyperGroup

if TYPE_CHECKING:
    from calidrop.compare import Row


def mb(n: int) -> str:
    return f"{n / 1e6:.2f}" if n < 1e8 else f"{n / 1e6:.0f}"


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("recipe", "what the cache does; parts joined by +", lambda r: r.recipe),
    ("KL", "nats the next-token distribution is away from the uncompressed model's, mean", lambda r: f"{r.kl:.4f}"),
    ("p95", "the same, 95th percentile over positions", lambda r: f"{r.kl_p95:.4f}"),
    ("agree", "how often the likeliest next token is the same", lambda r: f"{r.agreement:.0%}"),
    ("nll", "nats per true next token; lower is better", lambda r: f"{r.nll:.3f}"),
    ("device", "MB (10^6 bytes) the cache holds on the device", lambda r: mb(r.device_bytes)),
    ("host", "MB it holds in host memory, to ask evicted tokens again", lambda r: mb(r.host_bytes)),
    ("ratio", "uncompressed bytes / device bytes", lambda r: f"{r.ratio:.1f}x"),
    ("prefill", "seconds to attend and compress the context", lambda r: f"{r.prefill_s:.2f}"),
    ("ms/tok", "milliseconds per decoded token, median", lambda r: f"{r.decode_ms_per_token:.1f}"),
    ("asked", "how often a head went back to evicted tokens", lambda r: f"{r.recompute_rate:.0%}"),
)  # fmt: skip

Model = Annotated[str | None, typer.Option(help="Hub id or folder; default: the embedded SmolLM2-135M-Instruct.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of text that are compressed.")]
Continuation = Annotated[int, typer.Option(min=1, help="Tokens after them that are predicted one by one.")]
DType = Annotated[
    str | None, typer.Option("--dtype", help="Of the weights; default: float32 on the CPU, else bfloat16.")
]
Threads = Annotated[
    int | None, typer.Option(min=1, max=1024, help="CPU threads of torch; default: torch's own choice.")
]


class Group(TyperGroup):
    """Wrong input is one red line and exit code 2; anything else keeps its traceback."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except BrokenPipeError:
            raise  # `| head` is no mistake
        except (ValueError, OSError) as error:
            line = " ".join(str(error).split())
            if isinstance(error, OSError) and error.strerror and error.filename:
                line = f"{error.strerror}: {error.filename}"
            Console(stderr=True).print(f"[red]Error: {escape(line)}[/red]", soft_wrap=True, highlight=False)
            raise typer.Exit(2) from None


def stdout() -> Console:
    """stdout; 100 columns wide where there is no terminal to ask."""
    return Console(width=shutil.get_terminal_size((100, 24)).columns, highlight=False)


def read_text(path: Path | None, default: str = "time_machine.txt") -> str:
    """Of a file, of stdin (-), or of a book that comes along."""
    if path is None:
        return (resources.files("calidrop") / "data" / default).read_text("utf-8")
    try:
        return sys.stdin.buffer.read().decode("utf-8") if str(path) == "-" else path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def check_writable(path: Path | None) -> None:
    if path is None:
        return
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write {path}: a folder, or in a folder that does not exist")
    if not os.access(path if path.exists() else path.absolute().parent, os.W_OK):
        raise ValueError(f"cannot write {path}: no permission")


def need(*packages: str, extra: str) -> None:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"this needs {' and '.join(missing)}: pip install 'calidrop[{extra}]'")


def one_line(text: str) -> Text:
    return Text(" ".join(text.split()))


def parse_recipes(recipes: Sequence[str]) -> list[Any]:
    from calidrop.recipe import parse

    return [parse(recipe) for recipe in recipes]


def load_model(name: str | None, threads: int | None, dtype: str | None = None) -> tuple[Any, Any]:
    with Console(stderr=True).status("Starting torch"):
        import torch

        from calidrop.models import load
    if threads is not None:
        torch.set_num_threads(threads)
    return load(name, dtype=dtype)


class Bars:
    """A bar for each recipe, on stderr, gone when the result is there."""

    def __init__(self, progress: Progress):
        self.progress = progress
        self.tasks: dict[str, TaskID] = {}

    def __call__(self, recipe: str, done: int, total: int) -> None:
        if recipe not in self.tasks:
            self.tasks[recipe] = self.progress.add_task(escape(recipe))
        self.progress.update(self.tasks[recipe], completed=done, total=total)

    def stop(self) -> None:
        self.progress.stop()


@contextlib.contextmanager
def bars(doing: str, remaining: bool = False) -> Iterator[Bars]:
    clock = TimeRemainingColumn(elapsed_when_finished=True) if remaining else TimeElapsedColumn()
    columns = TextColumn(doing), BarColumn(), clock, TextColumn("{task.description}")
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield Bars(progress)


def print_rows(out: Console, rows: Sequence[Row]) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    for name, _, _ in COLUMNS:
        table.add_column(name, justify="left" if name == "recipe" else "right", overflow="fold")
    for row in rows:
        table.add_row(*(escape(value(row)) for _, _, value in COLUMNS))
    legend = Table(box=None, pad_edge=False, show_header=False, style="dim")
    for name, meaning, _ in COLUMNS:
        legend.add_row(name, meaning)
    full = rows[0]
    out.print("", table, "", legend, sep="\n")
    out.print(f"[dim]uncompressed: {mb(full.full_bytes)} MB, nll {full.nll_full:.3f}[/dim]\n")
