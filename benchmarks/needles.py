"""One sentence with a number hidden in a book, asked for after compression.

python -m benchmarks.needles --recipe 'snapkv(budget=128)' --recipe 'snapkv(budget=128)+kvcrush' [--samples N]

Per recipe: how often the number is found (every digit the likeliest token) and the nll of the number in nats, which
tells more at few samples; both with the standard error over samples. The question is in the compressed prompt
(--question seen), or comes after (--question later).
"""

from __future__ import annotations

import argparse
import json
import random
from importlib import resources
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import calidrop
from calidrop import KVCache
from calidrop.plugin import using

TEXT = resources.files("calidrop") / "data" / "alice.txt"
QUESTION = "\n\nThe magic number is"


def sample(tokenizer: Any, book: list[int], length: int, depth: float, draw: random.Random) -> tuple[list, list, list]:
    """Context with the needle, the question, the answer: token ids."""
    number = str(draw.randint(10**4, 10**5 - 1))
    needle = tokenizer(f"\nThe magic number is {number}.\n")["input_ids"]
    start = draw.randrange(len(book) - length)
    at = round(depth * (length - len(needle)))
    hay = book[start : start + length - len(needle)]
    return hay[:at] + needle + hay[at:], tokenizer(QUESTION)["input_ids"], tokenizer(f" {number}")["input_ids"]


@torch.inference_mode()
def ask(model: Any, recipe: str, context: list[int], later: list[int], answer: list[int]) -> tuple[float, float]:
    """1.0 if found, and the nll of the answer. `later` and the answer are fed one token at a time."""
    cache = KVCache(model, recipe, eager=True)
    logits = model(torch.tensor([context]), **using(cache), logits_to_keep=1).logits[0, -1]
    for token in later:
        logits = model(torch.tensor([[token]]), **using(cache)).logits[0, -1]
    found, nll = 1.0, 0.0
    for token in answer:
        found *= float(int(logits.argmax()) == token)
        nll -= float(logits.double().log_softmax(-1)[token])
        logits = model(torch.tensor([[token]]), **using(cache)).logits[0, -1]
    return found, nll


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--samples", type=int, default=24)
    parser.add_argument("--question", choices=("seen", "later"), default="seen")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = calidrop.load()
    book, draw = tokenizer(TEXT.read_text(), verbose=False)["input_ids"], random.Random(0)
    rows: dict[str, list[tuple[float, float]]] = {recipe: [] for recipe in args.recipe}
    for i in range(args.samples):
        hay, question, answer = sample(tokenizer, book, args.length, (i + 0.5) / args.samples, draw)
        seen = args.question == "seen"
        for recipe, told in rows.items():
            told.append(ask(model, recipe, hay + question if seen else hay, [] if seen else question, answer))
        print(f"{i + 1} of {args.samples}", flush=True)
    print(f"{'recipe':48} {'found':>14} {'nll':>16}   length {args.length}, question {args.question}")
    for recipe, told in rows.items():
        found, nll = zip(*told, strict=True)
        error = [stdev(x) / len(x) ** 0.5 if len(x) > 1 else float("nan") for x in (found, nll)]
        print(f"{recipe:48} {mean(found):7.1%} ±{error[0]:5.1%} {mean(nll):9.3f} ±{error[1]:.3f}")
    if args.json:
        args.json.write_text(json.dumps({"length": args.length, "question": args.question, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
