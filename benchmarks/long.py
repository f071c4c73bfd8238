"""Long generation from short prompts: how far a recipe is from the full cache after thousands of generated tokens.

python -m benchmarks.long [--budget 512] [--recipe R ...] [--tokens 4096] [--prompts 4] [--text FILE]

The full cache writes, sampled at temperature 0.8 with a fixed seed (greedily this model loops): half of the prompts
are 128 tokens of "Alice's Adventures in Wonderland", half are questions of GSM8K, left-padded to one batch. Every
recipe is fed the same tokens one by one, in lockstep. Without --recipe: every evictor that works while decoding, at
--budget. With --text, pages of it stand for what the model writes, which soon repeats itself at this size.

Results are kept in --folder: recipes that were measured are not run again, others are fed the tokens written then. A
run that was stopped goes on where it last saved (every 256 tokens).

Per recipe: KL to the full cache in nats, in all and in quarters of the generation, agreement of the likeliest token,
nll of the token written; mean over prompts, with the standard error over prompts. MB (10^6 bytes): the most the cache
ever held. ms: CPU time of attention and compression in a step, all layers and prompts, median.
"""

from __future__ import annotations

import argparse
import hashlib
import json
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import platformdirs
import torch
from torch import Tensor

import calidrop
from benchmarks.lockstep import TEMPERATURE, Found, Run
from benchmarks.snapkv_once import snapkv_once
from calidrop.methods import METHODS, h2o, lazy_eviction, snapkv, streaming_llm, tova
from calidrop.parts import Part
from calidrop.recipe import parse

BOOK = resources.files("calidrop") / "data" / "alice.txt"
QUESTIONS = resources.files("calidrop") / "data" / "gsm8k.jsonl"


def defaults(n: int) -> list[Part]:
    return [streaming_llm(n), snapkv_once(n), snapkv(n, every=16), h2o(n), tova(n), lazy_eviction(n)]


def prompts(tokenizer: Any, n: int) -> dict[str, Tensor]:
    """n prompts, left-padded: pages and questions in turn."""
    book = tokenizer(BOOK.read_text(), verbose=False)["input_ids"]
    questions = [json.loads(line)["question"] for line in QUESTIONS.read_text().splitlines()]
    rows = []
    for i in range(n):
        ask = [{"role": "user", "content": questions[i // 2 % len(questions)] + " Think step by step."}]
        asked = tokenizer.apply_chat_template(ask, add_generation_prompt=True, tokenize=False)
        start = 3000 + 4000 * (i // 2)
        rows.append(tokenizer(asked)["input_ids"] if i % 2 else book[start : start + 128])
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


def pages(tokenizer: Any, text: str, n: int, tokens: int) -> tuple[dict[str, Tensor], Tensor]:
    """n prompts of 128 tokens at even strides of a text, and what comes after them in it: [n,tokens+1]."""
    ids = tokenizer(text, verbose=False)["input_ids"]
    need = 128 + tokens + 1
    if len(ids) < need:
        raise ValueError(f"text too short: got {len(ids)} tokens, need {need}")
    starts = [i * (len(ids) - need) // max(1, n - 1) for i in range(n)]
    rows = torch.tensor([ids[start : start + need] for start in starts])
    return {"input_ids": rows[:, :128], "attention_mask": torch.ones_like(rows[:, :128])}, rows[:, 128:]


def measure(
    model: Any, tokenizer: Any, recipes: list[Any], inputs: dict[str, Tensor], n: int, fed: Tensor | None, folder: Path
) -> list[Found]:
    """One for each recipe; runs those that are not in the folder. fed: the tokens after the prompts, if given."""
    ids = inputs["input_ids"] if fed is None else fed
    folder /= _hash(json.dumps([n, "text" if fed is not None else TEMPERATURE, ids.tolist()]))
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{_hash(str(recipe))}.npz" for recipe in recipes]
    missing = [(recipe, path) for recipe, path in zip(recipes, paths, strict=True) if not path.is_file()]
    if missing:
        tokens = folder / "tokens.npy"
        saved = folder / f"{_hash(' '.join(str(recipe) for recipe, _ in missing))}.saved"
        if fed is None and tokens.is_file():
            fed = torch.from_numpy(np.load(tokens))
        run = Run(model, [recipe for recipe, _ in missing], inputs, n, saved)
        written, found = run(tokenizer.all_special_ids, fed)
        np.save(tokens, written.numpy())
        for (_, path), x in zip(missing, found, strict=True):
            np.savez(path, **x)
    return [dict(np.load(path)) for path in paths]


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def line(name: str, found: Found) -> str:
    n, P = found["kl"].shape
    quarters = [found["kl"][i * n // 4 : (i + 1) * n // 4].mean() for i in range(4)]
    kl, nll, agree = (found[k].mean(0) for k in ("kl", "nll", "agree"))
    error = kl.std(ddof=1) / P**0.5 if P > 1 else float("nan")
    return (
        f"{name:48} {kl.mean():7.4f} ±{error:.4f}  {' '.join(f'{x:.3f}' for x in quarters)} {agree.mean():6.1%} "
        f"{nll.mean():6.3f} {found['bytes'].max() / 1e6:7.2f} {np.median(found['ms']):6.1f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", default=[])
    parser.add_argument("--budget", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--prompts", type=int, default=4)
    parser.add_argument("--text", type=Path, help="feed what comes next in this text instead of what the model writes")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--folder", type=Path, default=Path(platformdirs.user_cache_dir("calidrop")) / "long")
    parser.add_argument("--json", type=Path, help="all numbers, one list per prompt")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    METHODS["snapkv_once"] = snapkv_once  # so that a recipe may name it, here
    recipes = [parse(recipe) for recipe in args.recipe] or defaults(args.budget)
    model, tokenizer = calidrop.load()
    inputs, fed = prompts(tokenizer, args.prompts), None
    if args.text:
        inputs, fed = pages(tokenizer, args.text.read_text(), args.prompts, args.tokens)
    rows = measure(model, tokenizer, recipes, inputs, args.tokens, fed, args.folder)
    print(f"{args.prompts} prompts, {args.tokens} tokens, nll of the full cache {rows[0]['nll_full'].mean():.3f}")
    print(f"{'recipe':48} {'KL':>7} {'':7}  {'in quarters':23} {'agree':>6} {'nll':>6} {'MB':>7} {'ms':>6}")
    for recipe, found in zip(recipes, rows, strict=True):
        print(line(str(recipe), found))
    if args.json:
        told = {
            str(recipe): {k: x.tolist() for k, x in found.items()} for recipe, found in zip(recipes, rows, strict=True)
        }
        args.json.write_text(json.dumps(told))


if __name__ == "__main__":
    main()
