"""`calidrop train`: what some methods learn from a model once, written to a file."""

from __future__ import annotations

import shlex
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from calidrop.terminal import Model, Threads, bars, check_writable, load_model, need, read_text, stdout

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
    """Soft tokens for judge_q(file='...'). A run that was stopped continues where it was.

    Keys and values of all samples stay in memory, in half precision.
    """
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
    steps: Annotated[int, typer.Option(min=1, help="Batches of 8 heads.")] = 3000,
    block: Annotated[int, typer.Option(min=1, help="Tokens pooled into one number.")] = 16,
    history: Annotated[int, typer.Option(min=1, help="Rows that the network sees.")] = 64,
    power: Annotated[float, typer.Option(help="What weights are raised to; the paper's is 1.")] = 0.25,
    decay: Annotated[float, typer.Option(help="What a row weighs to the next in the mean; the paper's is 1.")] = 0.7,
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
    said += ["--block", str(block), "--history", str(history), "--power", str(power), "--decay", str(decay)]
    sizes = {"steps": steps, "block": block, "history": history, "power": power, "decay": decay}
    options = {**sizes, "name": name, "command": shlex.join(said)}
    ids = cut(tokenizer, words, windows, length)
    others = None if held_out is None else cut(tokenizer, held_out, 4, length)  # too short a text must not wait
    with bars("training", remaining=True) as tick:
        made, meta = train(lm, ids, out, progress=tick, **options)
        found = None if others is None else recall(lm, others, made, meta, progress=tick)
    stdout().print(f"{out}: {sum(x.numel() for x in made.weights.values())} parameters", highlight=False)
    if found is not None:
        stdout().print(shown(found), highlight=False)


class How(str, Enum):
    distill = "distill"
    rl = "rl"


@app.command("g-kv")
def g_kv(
    how: Annotated[How, typer.Option(help="The full cache teaches; or GRPO, with a checked reward.")] = How.distill,
    recipe: Annotated[str, typer.Option(help="As it will be used.")] = "g_kv(budget=64, every=32)",
    model: Model = None,
    out: Annotated[Path | None, typer.Option(help="A folder; default: g-kv-MODEL-HOW here.")] = None,
    data: Annotated[Path | None, typer.Option(help="JSON lines with question and answer; default: GSM8K's.")] = None,
    held_out: Annotated[int, typer.Option(min=1, help="The last rows, for measuring only.")] = 24,
    steps: Annotated[int | None, typer.Option(min=1, help="Default: 40 (distill), 20 (rl).")] = None,
    rate: Annotated[
        float | None, typer.Option(min=0, help="Learning rate; default: 2e-4 (distill), 1e-4 (rl).")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="distill: rows a step.")] = 4,
    prompts: Annotated[int, typer.Option(min=1, help="rl: questions a step.")] = 1,
    samples: Annotated[int, typer.Option(min=2, help="rl: answers to each.")] = 8,
    new: Annotated[int, typer.Option(min=1, help="rl: tokens of an answer, at most.")] = 96,
    rank: Annotated[int, typer.Option(min=1, help="Of the LoRA adapter.")] = 16,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    threads: Threads = None,
) -> None:
    """A LoRA adapter for a model whose cache evicts. A run that was stopped continues where it was."""
    need("trl", "peft", extra="train")
    name = model or "smollm2"
    out = out or Path(f"g-kv-{Path(name).name}-{how.value}")
    if out.exists():
        raise ValueError(f"{out} exists: delete it or choose another output")
    from datasets import disable_progress_bars

    from calidrop.train import _gsm8k
    from calidrop.train._sparse import check_sparse

    rows = _gsm8k.rows(data)
    check_sparse(recipe)
    lm, tokenizer = load_model(model, threads)
    disable_progress_bars()
    given: dict[str, Any] = {"held_out": held_out, "rank": rank, "seed": seed}
    given |= {n: x for n, x in (("steps", steps), ("rate", rate)) if x is not None}
    given |= {"batch": batch} if how is How.distill else {"prompts": prompts, "samples": samples, "new": new}
    said = ["calidrop", "train", "g-kv", "--how", how.value, "--recipe", recipe, "--model", name, "--out", str(out)]
    said += [] if data is None else ["--data", str(data)]
    said += [word for n, x in given.items() for word in ("--" + n.replace("_", "-"), str(x))]
    if how is How.distill:
        from calidrop.train.distill import train
    else:
        from calidrop.train.reinforce import train
    with bars("training", remaining=True) as tick:
        told = train(lm, tokenizer, rows, out, recipe, name=name, command=shlex.join(said),
                     progress=tick, **given)  # fmt: skip
    pairs = (f"{n} {told['before'][n]:.4f} -> {x:.4f}" for n, x in told["after"].items() if x != told["before"][n])
    stdout().print(f"{out}: on {held_out} held-out rows, {', '.join(pairs)}", highlight=False)
