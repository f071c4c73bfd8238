"""What `calidrop plan` shows: a bar with the time that is left, and the table of what fits."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from calidrop.compare import Row
from calidrop.planning import Advice, Option
from calidrop.terminal import COLUMNS, mb

OPTION_COLUMNS: tuple[tuple[str, str, Callable[[Option], str]], ...] = (
    ("recipe", "", lambda o: o.recipe),
    ("device", "MB (10^6 bytes) on the device after the prompts, predicted by running the recipe on one head",
     lambda o: mb(o.device_bytes)),
    ("host", "the same in host memory", lambda o: mb(o.host_bytes)),
    ("B/token", "device bytes per token of context", lambda o: f"{o.bytes_per_token:.0f}"),
    ("ratio", "uncompressed bytes / device bytes", lambda o: f"{o.ratio:.1f}x"),
    ("tokens", "per kv head, answered from on the device", lambda o: f"{o.tokens:.0f}"),
    ("bits", "of the coarsest codes, per channel", lambda o: f"{o.bits:.3g}"),
)  # fmt: skip
MEASURED_COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    *(column for column in COLUMNS if column[0] in ("KL", "agree", "ms/tok")),
)


@contextlib.contextmanager
def overall(doing: str, runs: int | None = None) -> Iterator[Callable[[str, int, int], None]]:
    """One bar over many recipes, with the time that is left. runs: how many each report their own (done, total); None:
    what they report is the whole."""
    columns = TextColumn(doing), BarColumn(), TimeRemainingColumn(), TextColumn("{task.description}")
    console = Console(stderr=True)
    parts: dict[str, float] = {}
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=1.0)

        def tick(recipe: str, done: int, total: int) -> None:
            parts[recipe] = done / total
            whole = done / total if runs is None else sum(parts.values()) / runs
            progress.update(task, completed=whole, description=escape(recipe))

        yield tick


def print_advice(out: Console, advice: Advice) -> None:
    measured = advice.recommended.row is not None
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0), header_style="bold")
    legend = Table(box=None, pad_edge=False, show_header=False, style="dim")
    for name, meaning, _ in (*OPTION_COLUMNS, *(MEASURED_COLUMNS if measured else ())):
        table.add_column(name, justify="left" if name == "recipe" else "right", overflow="fold")
        if meaning:
            legend.add_row(name, meaning)
    if measured:
        table.add_column("")
        legend.add_row("*", "on the front: nothing else is both smaller on the device and nearer")
    for o in advice.options:
        told = [value(o) for _, _, value in OPTION_COLUMNS]
        told += [value(o.row) for _, _, value in MEASURED_COLUMNS if o.row] + (["*" if o.front else ""] * measured)
        table.add_row(*map(escape, told), style="bold" if o.front or o is advice.recommended else "")
    out.print("", table, "", legend, sep="\n")
    why = "lowest KL" if measured else "most tokens at 4 bits or more; --measure asks your text instead"
    out.print(f"\nrecommended: [bold]{escape(advice.recommended.recipe)}[/bold] ({why})")
    out.print(
        f"[dim]context {advice.context}, batch {advice.batch}, {advice.dtype}\n"
        f"uncompressed: {mb(advice.full_bytes)} MB\n"
        f"device: {mb(advice.memory)} MB ({advice.memory_source})\n"
        f"host: {mb(advice.host_memory)} MB ({advice.host_source})[/dim]"
    )
    for note in advice.notes:
        out.print(f"[dim]{escape(note)}[/dim]")
