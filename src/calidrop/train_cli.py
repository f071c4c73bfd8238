"""`calidrop train`: what some methods learn from a model once, written to a file."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from calidrop.terminal import Model, Threads, bars, check_writable, load_model, read_text, stdout

app = typer.Typer(no_args_is_help=True)


@app.command()
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
    check_writable(out)
    words = read_text(text)
    lm, tokenizer = load_model(model, threads)
    from calidrop.train.recalkv import train
    from calidrop.train.recalkv import windows as cut

    said = ["calidrop", "train", "recalkv", "--model", name, "--keep", str(keep), "--out", str(out)]
    said += [] if text is None else ["--text", str(text)]
    said += ["--windows", str(windows), "--length", str(length), "--gradients", str(gradients)]
    said += [] if multiple is None else ["--multiple", str(multiple)]
    options = {"keep": keep, "fisher": gradients, "multiple": multiple, "name": name, "command": shlex.join(said)}
    with bars("training", remaining=True) as tick:
        made = train(lm, cut(tokenizer, words, windows, length), out, progress=tick, **options)
    keys, values = (sum(pair[i] for pair in made.meta["ranks"]) for i in (0, 1))
    whole = made.meta["layers"] * made.meta["kv_heads"] * made.meta["head_dim"]
    stdout().print(f"{out}: {keys} of {whole} key dims, {values} of {whole} value dims", highlight=False)
