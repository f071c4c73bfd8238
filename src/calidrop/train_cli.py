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
    from calidrop.train._text import windows as cut
    from calidrop.train.recalkv import train

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


@app.command()
def judge_q(
    model: Model = None,
    tokens: Annotated[int, typer.Option(min=1, help="Soft tokens.")] = 32,
    out: Annotated[Path | None, typer.Option(help="Default: judge_q-MODEL.safetensors here.")] = None,
    text: Annotated[Path | None, typer.Option(help="Passages are cut from it; default: The Time Machine.")] = None,
    questions: Annotated[
        Path | None, typer.Option(help='JSONL with a "question" on each line, to be asked too.')
    ] = None,
    samples: Annotated[int, typer.Option(min=1, help="Prompts.")] = 128,
    shortest: Annotated[int, typer.Option(min=8, help="Tokens of the shortest passage.")] = 96,
    longest: Annotated[int, typer.Option(min=8, help="Tokens of the longest passage.")] = 768,
    response: Annotated[int, typer.Option(min=1, help="Tokens of each response, at most.")] = 48,
    epochs: Annotated[int, typer.Option(min=1, help="Times each sample is seen.")] = 6,
    rate: Annotated[float, typer.Option(min=0.0, help="Adam's first learning rate.")] = 0.01,
    loss: Annotated[str, typer.Option(help="mse (the paper's) or kl.")] = "mse",
    seed: int = 0,
    threads: Threads = None,
) -> None:
    """Soft tokens for judge_q(file='...'). A run that was stopped continues where it was."""
    name = model or "smollm2"
    out = out or Path(f"judge_q-{Path(name).name}.safetensors")
    check_writable(out)
    words = read_text(text)
    from calidrop.train._prompts import prompts, read_questions

    asked = read_questions(questions)
    lm, tokenizer = load_model(model, threads)
    from calidrop.train.judge_q import Options, train

    options = Options(tokens, response, epochs, rate=rate, loss=loss, seed=seed)

    said = ["calidrop", "train", "judge-q", "--model", name, "--tokens", str(tokens), "--out", str(out)]
    said += [] if text is None else ["--text", str(text)]
    said += [] if questions is None else ["--questions", str(questions)]
    said += ["--samples", str(samples), "--shortest", str(shortest), "--longest", str(longest)]
    said += ["--response", str(response), "--epochs", str(epochs), "--rate", str(rate), "--loss", loss]
    said += ["--seed", str(seed)]
    chats = prompts(tokenizer, words, asked, samples, shortest, longest, seed)
    with bars("training", remaining=True) as tick:
        made = train(lm, chats, out, options, name=name, command=shlex.join(said), progress=tick)
    first, last = made.meta["losses"][0], made.meta["losses"][-1]
    stdout().print(f"{out}: {tokens} soft tokens, loss {first:.4f} in the first epoch, {last:.4f} in the last")


@app.command()
def attention_predictor(
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="Default: attention_predictor-MODEL.safetensors here.")] = None,
    text: Annotated[Path | None, typer.Option(help="Calibration text; default: The Time Machine.")] = None,
    windows: Annotated[int, typer.Option(min=1, help="Pieces of the text.")] = 8,
    length: Annotated[int, typer.Option(min=2, help="Tokens of each.")] = 2048,
    steps: Annotated[int, typer.Option(min=1, help="Batches of 32 heads.")] = 3000,
    block: Annotated[int, typer.Option(min=1, help="Tokens pooled into one number.")] = 16,
    history: Annotated[int, typer.Option(min=1, help="Rows that the network sees.")] = 64,
    evaluate: Annotated[Path | None, typer.Option(help="Held-out text: print how many blocks are found.")] = None,
    threads: Threads = None,
) -> None:
    """The network of attention_predictor(file='...'). A run that was stopped continues where it was."""
    name = model or "smollm2"
    out = out or Path(f"attention_predictor-{Path(name).name}.safetensors")
    check_writable(out)
    words, held_out = read_text(text), None if evaluate is None else read_text(evaluate)
    lm, tokenizer = load_model(model, threads)
    from calidrop.train._text import windows as cut
    from calidrop.train.attention_predictor import recall, train
    from calidrop.train.attention_predictor import table as shown

    said = ["calidrop", "train", "attention-predictor", "--model", name, "--out", str(out)]
    said += [] if text is None else ["--text", str(text)]
    said += ["--windows", str(windows), "--length", str(length), "--steps", str(steps)]
    said += ["--block", str(block), "--history", str(history)]
    options = {"steps": steps, "block": block, "history": history, "name": name, "command": shlex.join(said)}
    with bars("training", remaining=True) as tick:
        made, meta = train(lm, cut(tokenizer, words, windows, length), out, progress=tick, **options)
        found = None
        if held_out is not None:
            found = recall(lm, cut(tokenizer, held_out, 4, length), made, meta, progress=tick)
    stdout().print(f"{out}: {sum(x.numel() for x in made.weights.values())} parameters", highlight=False)
    if found is not None:
        stdout().print(shown(found), highlight=False)
