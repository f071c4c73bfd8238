"""`calidrop show`: a page of what recipes hold of a text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from calidrop.terminal import DType, Model, Threads, bars, check_writable, load_model, parse_recipes, read_text


def show(
    text: Annotated[Path | None, typer.Option(help="A text file, - for stdin; default: Alice in Wonderland.")] = None,
    recipe: Annotated[
        list[str] | None, typer.Option(help="Give it several times; default: a few to learn from.")
    ] = None,
    context: Annotated[int | None, typer.Option(min=1, help="Tokens of it; default: all, 1024 at most.")] = None,
    generate: Annotated[int, typer.Option(min=0, help="Let every recipe write so many tokens first.")] = 0,
    model: Model = None,
    out: Annotated[Path, typer.Option("-o", "--out", help="Where the page goes.")] = Path("show.html"),
    dtype: DType = None,
    threads: Threads = None,
) -> None:
    """Which tokens of a text each recipe still holds, where and in what form: a page to look at, offline."""
    recipes, words = parse_recipes(recipe) if recipe else None, read_text(text, default="alice.txt")
    check_writable(out)
    if not words:
        raise ValueError("empty text: expected at least one token")
    with Console(stderr=True).status("Reading the text"):
        from calidrop.models import peek
        from calidrop.showing import beginning
    beginning(peek(model)[1], words, context)  # for its errors, before the weights are read
    lm, tokenizer = load_model(model, threads, dtype)
    from calidrop.showing import show as run

    with bars("compressing") as tick:
        shown = run(lm, tokenizer, words, recipes, context, generate, tick)
    out.write_text(shown.page(), "utf-8")
    typer.echo(f"{out}: {len(shown.context)} tokens under {len(shown.held)} recipes; open it in a browser")
