"""The command line. Whatever imports torch is imported inside a command, so that `--help` answers at once."""

from __future__ import annotations

import contextlib
import inspect
import json
import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
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


def _mb(n: int) -> str:
    return f"{n / 1e6:.2f}" if n < 1e8 else f"{n / 1e6:.0f}"


COLUMNS: tuple[tuple[str, str, Callable[[Row], str]], ...] = (
    ("recipe", "what the cache does; parts joined by +", lambda r: r.recipe),
    ("KL", "nats the next-token distribution is away from the uncompressed model's, mean", lambda r: f"{r.kl:.4f}"),
    ("p95", "the same, 95th percentile over positions", lambda r: f"{r.kl_p95:.4f}"),
    ("agree", "how often the likeliest next token is the same", lambda r: f"{r.agreement:.0%}"),
    ("nll", "nats per true next token; lower is better", lambda r: f"{r.nll:.3f}"),
    ("device", "MB (10^6 bytes) the cache holds on the device", lambda r: _mb(r.device_bytes)),
    ("host", "MB it holds in host memory, to ask evicted tokens again", lambda r: _mb(r.host_bytes)),
    ("ratio", "uncompressed bytes / device bytes", lambda r: f"{r.ratio:.1f}x"),
    ("prefill", "seconds to attend and compress the context", lambda r: f"{r.prefill_s:.2f}"),
    ("ms/tok", "milliseconds per decoded token, median", lambda r: f"{r.decode_ms_per_token:.1f}"),
    ("asked", "how often a head went back to evicted tokens", lambda r: f"{r.recompute_rate:.0%}"),
)  # fmt: skip

Model = Annotated[str | None, typer.Option(help="Hub id or folder; default: the embedded SmolLM2-135M-Instruct.")]
Context = Annotated[int, typer.Option(min=1, help="Tokens of text that are compressed.")]
Continuation = Annotated[int, typer.Option(min=1, help="Tokens after them that are predicted one by one.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads of torch; default: torch's own choice.")]


class _Group(TyperGroup):
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


app = typer.Typer(cls=_Group, no_args_is_help=True, add_completion=False)
trainings = typer.Typer(no_args_is_help=True)
app.add_typer(trainings, name="train", help="Learn once what some methods need, and write it to a file.")


def _version(asked: bool) -> None:
    if asked:
        from calidrop import __version__

        typer.echo(f"calidrop {__version__}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Print it.")] = False,
) -> None:
    """KV-cache compression for Hugging Face models."""


@app.command()
def demo(
    model: Model = None,
    context: Context = 2048,
    continuation: Continuation = 64,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens each recipe generates.")] = 48,
    threads: Threads = None,
) -> None:
    """Compress the opening of The Time Machine in five ways: sizes, speeds, predictions, and what is written next."""
    budget = max(40, context // 8)
    evict = f"(budget={budget})"
    recipes = ["full", "kivi(bits=4)", f"snapkv{evict}", f"snapkv{evict}+calidrop", f"adakv{evict}+calidrop"]
    text, out = _text(None), _console()
    lm, tokenizer = _load(model, threads)
    from calidrop.compare import compare
    from calidrop.generate import generate

    out.print(f"{context} tokens of The Time Machine are compressed, the next {continuation} predicted one by one.")
    with _progress("comparing") as tick:
        rows = compare(lm, tokenizer, text, recipes, context, continuation, tick)
    _print_rows(out, rows)
    ids = tokenizer(text, verbose=False)["input_ids"]
    prompt = tokenizer.decode(ids[:context], skip_special_tokens=True)
    with _progress("generating") as tick:
        made = [generate(lm, tokenizer, prompt, recipe, tokens, progress=tick) for recipe in recipes]
    story = Table(box=None, pad_edge=False, show_header=False)
    story.add_column(style="bold")
    story.add_row("the context ends", _one_line("… " + prompt[-140:]))
    story.add_row("the book goes on", _one_line(tokenizer.decode(ids[context : context + tokens])))
    for recipe, one in zip(recipes, made, strict=True):
        story.add_row(recipe, _one_line(one.text))
    out.print(story, "\n[dim]Next: calidrop methods, calidrop compare --help[/dim]")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read it from a file instead.")] = None,
    recipe: Annotated[str, typer.Option(help="Like 'snapkv(budget=256)+calidrop'.")] = "full",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    model: Model = None,
    describe: Annotated[bool, typer.Option("--describe", help="Say what each layer holds at the end.")] = False,
    threads: Threads = None,
) -> None:
    """Continue a text greedily with a compressed cache. No chat template is applied."""
    if (prompt is None) == (file is None):
        raise ValueError("give either a PROMPT or --file")
    text = prompt if file is None else _text(file)
    recipes = _parse([recipe])
    lm, tokenizer = _load(model, threads)
    from calidrop.generate import generate as run

    with _progress("prefill") as tick:

        def show(piece: str) -> None:
            tick.stop()  # the text takes the bar's place
            typer.echo(piece, nl=False)

        made = run(lm, tokenizer, text or "", recipes[0], max_new_tokens, show, tick)
    typer.echo()
    cache = made.cache
    typer.echo(
        f"{_mb(cache.nbytes)} MB on the device, {_mb(cache.host_nbytes)} MB on the host, "
        f"{_mb(cache.full_nbytes)} MB uncompressed; prefill {made.prefill_s:.2f} s, "
        f"{len(made.tokens)} tokens at {made.decode_ms_per_token:.1f} ms",
        err=True,  # so that stdout is the text alone
    )
    if describe:
        typer.echo(cache.describe(), err=True)


@app.command()
def compare(
    recipe: Annotated[list[str], typer.Option(help="Like 'snapkv(budget=256)+calidrop'; give it several times.")],
    text: Annotated[Path | None, typer.Option(help="A text file; default: The Time Machine.")] = None,
    model: Model = None,
    context: Context = 2048,
    continuation: Continuation = 64,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write the rows to this file.")] = None,
    threads: Threads = None,
) -> None:
    """Measure recipes against the uncompressed cache: sizes, speeds and predictions."""
    recipes, words = _parse(recipe), _text(text)
    _check_writable(json_out)
    lm, tokenizer = _load(model, threads)
    from calidrop.compare import compare as run

    with _progress("comparing") as tick:
        rows = run(lm, tokenizer, words, recipes, context, continuation, tick)
    if json_out is not None:
        json_out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    _print_rows(_console(), rows)


@trainings.command()
def recalkv(
    model: Model = None,
    keep: Annotated[float, typer.Option(min=0.0, max=1.0, help="The fraction of all key and value dims.")] = 0.5,
    out: Annotated[Path | None, typer.Option(help="Default: recalkv-MODEL-KEEP.safetensors here.")] = None,
    text: Annotated[Path | None, typer.Option(help="Calibration text; default: The Time Machine.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 32,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 1024,
    gradients: Annotated[int, typer.Option(min=1, help="How many of them give gradients, which set the ranks.")] = 8,
    multiple: Annotated[int | None, typer.Option(min=1, help="Of what ranks are multiples; default: 8 or 32.")] = None,
    threads: Threads = None,
) -> None:
    """Low-rank bases of keys and values for recalkv(file='...'). A run that was stopped continues where it was."""
    name = model or "smollm2"
    out = out or Path(f"recalkv-{Path(name).name}-{keep:g}.safetensors")
    if out.is_dir() or not out.absolute().parent.is_dir():
        raise ValueError(f"cannot write {out}: a folder, or in a folder that does not exist")
    words = _text(text)
    lm, tokenizer = _load(model, threads)
    from calidrop.train.recalkv import train
    from calidrop.train.recalkv import windows as cut

    said = ["calidrop", "train", "recalkv", "--model", name, "--keep", str(keep), "--out", str(out)]
    said += [] if text is None else ["--text", str(text)]
    said += ["--windows", str(windows), "--length", str(length), "--gradients", str(gradients)]
    said += [] if multiple is None else ["--multiple", str(multiple)]
    options = {"keep": keep, "fisher": gradients, "multiple": multiple, "name": name, "command": shlex.join(said)}
    with _progress("training", remaining=True) as tick:
        made = train(lm, cut(tokenizer, words, windows, length), out, progress=tick, **options)
    keys, values = (sum(pair[i] for pair in made.meta["ranks"]) for i in (0, 1))
    whole = made.meta["layers"] * made.meta["kv_heads"] * made.meta["head_dim"]
    _console().print(f"{out}: {keys} of {whole} key dims, {values} of {whole} value dims", highlight=False)


@app.command()
def plan(
    context: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")],
    model: Model = None,
    config: Annotated[Path | None, typer.Option(help="Instead of a model: its config.json, or the folder.")] = None,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at once.")] = 1,
    memory: Annotated[str | None, typer.Option(help="Like 2GiB or 512MB; default: what the device has free.")] = None,
    host_memory: Annotated[str | None, typer.Option(help="The same for the host; 0 leaves calidrop out.")] = None,
    recipe: Annotated[list[str] | None, typer.Option(help="Try these only; give it several times.")] = None,
    measure: Annotated[bool, typer.Option("--measure", help="Run what fits on --text and go by the KL.")] = False,
    text: Annotated[Path | None, typer.Option(help="A text file; default: The Time Machine.")] = None,
    continuation: Continuation = 64,
    plot: Annotated[Path | None, typer.Option(help="Draw KL against bytes to this PNG.")] = None,
    json_out: Annotated[Path | None, typer.Option("--json", help="Write everything to this file.")] = None,
    threads: Threads = None,
) -> None:
    """Which recipes fit into a memory, and which of them to take."""
    if model is not None and config is not None:
        raise ValueError("give either --model or --config")
    if config is not None and measure:
        raise ValueError("--measure needs a model with weights: give --model instead of --config")
    if not measure and (plot is not None or text is not None):
        raise ValueError("--plot and --text need --measure")
    recipes, words = _parse(recipe) if recipe else None, _text(text) if measure else ""
    _check_writable(json_out)
    _check_writable(plot)
    lm, tokenizer = _load(model, threads) if config is None else (None, None)
    from calidrop import pareto
    from calidrop.plan_cli import overall, print_advice
    from calidrop.planning import plan as run
    from calidrop.skeleton import read_config

    with overall("running one head") as tick:
        advice = run(lm if config is None else read_config(config), context=context, batch=batch, memory=memory,
                     host_memory=host_memory, recipes=recipes, progress=tick)  # fmt: skip
    if measure and lm is not None:
        runs = len({"full", *(o.recipe for o in advice.options)})
        with overall("measuring", runs) as tick:
            advice = advice.measure(lm, tokenizer, words, continuation, tick)
    if json_out is not None:
        told = {"recommended": advice.recommended.recipe} | asdict(advice)
        json_out.write_text(json.dumps(told, indent=1) + "\n")
    if plot is not None:
        pareto.draw(advice, plot)
    print_advice(_console(), advice)


@app.command()
def methods() -> None:
    """What a recipe can be made of."""
    from calidrop.methods import METHODS

    table = Table("method", "role", "arguments", "paper", box=None, pad_edge=False)
    for column in (table.columns[0], table.columns[1], table.columns[3]):
        column.no_wrap = True
    for name, build in METHODS.items():
        signature = inspect.signature(build, eval_str=True)
        given = (n if p.default is p.empty else f"{n}={p.default!r}" for n, p in signature.parameters.items())
        source = build.paper.partition(", ")[2] or build.paper  # without the name, which the first column has
        table.add_row(f"[bold]{name}[/bold]", signature.return_annotation.role, escape(", ".join(given)), source)
    out = _console()
    out.print(table)
    out.print(
        "\nA recipe joins them with +, one for each role: snapkv(budget=512)+kivi(bits=4)+calidrop\n"
        "budget: tokens per kv head (int), or a fraction of the prompt (float below 1)",
        highlight=False,
    )


def _console() -> Console:
    """stdout; 100 columns wide where there is no terminal to ask."""
    return Console(width=shutil.get_terminal_size((100, 24)).columns, highlight=False)


def _text(path: Path | None) -> str:
    if path is None:
        return (resources.files("calidrop") / "data" / "time_machine.txt").read_text("utf-8")
    try:
        return path.read_text("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _check_writable(path: Path | None) -> None:
    if path is not None and (path.is_dir() or not path.absolute().parent.is_dir()):
        raise ValueError(f"cannot write {path}: a folder, or in a folder that does not exist")


def _one_line(text: str) -> Text:
    return Text(" ".join(text.split()))


def _parse(recipes: Sequence[str]) -> list[Any]:
    from calidrop.recipe import parse

    return [parse(recipe) for recipe in recipes]


def _load(name: str | None, threads: int | None) -> tuple[Any, Any]:
    with Console(stderr=True).status("Starting torch"):
        import torch

        from calidrop.models import load
    if threads is not None:
        torch.set_num_threads(threads)
    return load(name)


class _Bars:
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
def _progress(doing: str, remaining: bool = False) -> Iterator[_Bars]:
    clock = TimeRemainingColumn(elapsed_when_finished=True) if remaining else TimeElapsedColumn()
    columns = TextColumn(doing), BarColumn(), clock, TextColumn("{task.description}")
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        yield _Bars(progress)


def _print_rows(out: Console, rows: Sequence[Row]) -> None:
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
    out.print(f"[dim]uncompressed: {_mb(full.full_bytes)} MB, nll {full.nll_full:.3f}[/dim]\n")
