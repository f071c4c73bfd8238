"""The command line. Whatever imports torch is imported inside a command, so that `--help` answers at once."""

from __future__ import annotations

import inspect
import json
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape
from rich.table import Table

from calidrop import eval_cli, report_cli, show_cli, train_cli
from calidrop.terminal import (
    Context,
    Continuation,
    DType,
    Group,
    Model,
    Threads,
    bars,
    check_writable,
    load_model,
    mb,
    one_line,
    parse_recipes,
    print_rows,
    read_text,
    stdout,
)

app = typer.Typer(cls=Group, no_args_is_help=True, add_completion=False)
app.add_typer(train_cli.app, name="train", help="Learn once what some methods need, and write it to a file.")
app.command("eval", cls=eval_cli.Command)(eval_cli.evaluate)
app.command()(report_cli.report)
app.command("show")(show_cli.show)


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
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Compress the opening of The Time Machine in five ways: sizes, speeds, predictions, and what is written next."""
    budget = max(40, context // 8)
    evict = f"(budget={budget})"
    recipes = ["full", "kivi(bits=4)", f"snapkv{evict}", f"snapkv{evict}+calidrop", f"adakv{evict}+calidrop"]
    text, out = read_text(None), stdout()
    lm, tokenizer = load_model(model, threads, dtype)
    from calidrop.compare import compare
    from calidrop.generate import generate

    out.print(f"{context} tokens of The Time Machine are compressed, the next {continuation} predicted one by one.")
    with bars("comparing") as tick:
        rows = compare(lm, tokenizer, text, recipes, context, continuation, tick)
    print_rows(out, rows)
    ids = tokenizer(text, verbose=False)["input_ids"]
    prompt = tokenizer.decode(ids[:context], skip_special_tokens=True)
    with bars("generating") as tick:
        made = [generate(lm, tokenizer, prompt, recipe, tokens, progress=tick) for recipe in recipes]
    story = Table(box=None, pad_edge=False, show_header=False)
    story.add_column(style="bold")
    story.add_row("the context ends", one_line("… " + prompt[-140:]))
    story.add_row("the book goes on", one_line(tokenizer.decode(ids[context : context + tokens])))
    for recipe, one in zip(recipes, made, strict=True):
        story.add_row(recipe, one_line(one.text))
    out.print(story, "\n[dim]Next: calidrop methods, calidrop compare --help[/dim]")


@app.command()
def generate(
    prompt: Annotated[str | None, typer.Argument(help="The text to continue.")] = None,
    file: Annotated[Path | None, typer.Option(help="Read it from a file instead.")] = None,
    recipe: Annotated[str, typer.Option(help="Like 'snapkv(budget=256)+calidrop'.")] = "full",
    max_new_tokens: Annotated[int, typer.Option(min=1)] = 64,
    model: Model = None,
    describe: Annotated[bool, typer.Option("--describe", help="Say what each layer holds at the end.")] = False,
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Continue a text greedily with a compressed cache. No chat template is applied."""
    if (prompt is None) == (file is None):
        raise ValueError("give either a PROMPT or --file")
    text = prompt if file is None else read_text(file)
    recipes = parse_recipes([recipe])
    lm, tokenizer = load_model(model, threads, dtype)
    from calidrop.generate import generate as run

    with bars("prefill") as tick:

        def show(piece: str) -> None:
            tick.stop()  # the text takes the bar's place
            typer.echo(piece, nl=False)

        made = run(lm, tokenizer, text or "", recipes[0], max_new_tokens, show, tick)
    typer.echo()
    cache = made.cache
    typer.echo(
        f"{mb(cache.nbytes)} MB on the device, {mb(cache.host_nbytes)} MB on the host, "
        f"{mb(cache.full_nbytes)} MB uncompressed; prefill {made.prefill_s:.2f} s, "
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
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Measure recipes against the uncompressed cache: sizes, speeds and predictions."""
    recipes, words = parse_recipes(recipe), read_text(text)
    check_writable(json_out)
    lm, tokenizer = load_model(model, threads, dtype)
    from calidrop.compare import compare as run

    with bars("comparing") as tick:
        rows = run(lm, tokenizer, words, recipes, context, continuation, tick)
    if json_out is not None:
        json_out.write_text(json.dumps([asdict(row) for row in rows], indent=1) + "\n")
    print_rows(stdout(), rows)


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
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Which recipes fit into a memory, and which of them to take."""
    if model is not None and config is not None:
        raise ValueError("give either --model or --config")
    if config is not None and measure:
        raise ValueError("--measure needs a model with weights: give --model instead of --config")
    if not measure and (plot is not None or text is not None):
        raise ValueError("--plot and --text need --measure")
    recipes, words = parse_recipes(recipe) if recipe else None, read_text(text) if measure else ""
    check_writable(json_out)
    check_writable(plot)
    from calidrop import pareto

    if plot is not None:
        pareto.check_drawing(plot)
    lm, tokenizer = load_model(model, threads, dtype) if config is None else (None, None)
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
    print_advice(stdout(), advice)


@app.command()
def methods() -> None:
    """What a recipe can be made of."""
    from calidrop.methods import METHODS
    from calidrop.parts import role_of

    table = Table("method", "role", "arguments", "paper", box=None, pad_edge=False)
    for column in (table.columns[0], table.columns[1], table.columns[3]):
        column.no_wrap = True
    for name, build in METHODS.items():
        signature = inspect.signature(build)
        given = (n if p.default is p.empty else f"{n}={p.default!r}" for n, p in signature.parameters.items())
        source = build.paper.partition(", ")[2] or build.paper  # without the name, which the first column has
        table.add_row(f"[bold]{name}[/bold]", role_of(build), escape(", ".join(given)), source)
    out = stdout()
    out.print(table)
    out.print(
        "\nA recipe joins them with +, one for each role: snapkv(budget=512)+kivi(bits=4)+calidrop\n"
        "budget: tokens per kv head (int), or a fraction of the prompt (float below 1)",
        highlight=False,
    )
