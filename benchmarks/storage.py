"""Storage formats at the bytes they really take, with transformers' own quantized cache in the same run.

python -m benchmarks.storage [--model FOLDER] [--context 1536] [--texts 3] [--recipe R ...] [--json OUT]

KL to the full cache on pages of "Alice's Adventures in Wonderland" (no default was chosen on it), mean over texts.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from statistics import mean

import torch
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

import calidrop
from calidrop.compare import Row, compare
from calidrop.support import layer_kinds

TEXT = resources.files("calidrop") / "data" / "alice.txt"
RECIPES = [
    "full",
    "int8",
    "fp8",
    "int4",
    "int4(rotate=False)",
    "kivi(bits=4, residual=32)",
    "kivi(bits=2, residual=32)",
    "kivi(bits=2, group=64, residual=64)",
    "ott(block=64)",
    "ott",
    "ott(pool=0)",
    "kivi(bits=2, residual=200)",
    "mixkvq(residual=32)",
    "decoquant",
    "think(keep=0.6)",
    "snapkv(budget=0.8)",
    "h2o(budget=0.2)+mikv(bits=2)",
    "h2o(budget=0.27)",
    "h2o(budget=0.2)+mikv(bits=4)",
    "h2o(budget=0.36)",
    "snapkv(budget=128)",
    "snapkv(budget=416)+int4",
]


def table(rows: dict[str, list[Row]]) -> str:
    full = rows["full"][0]
    head = f"{'recipe':34} {'KL':>8} {'agree':>6} {'bytes':>6} {'prefill':>8} {'decode':>7}"
    lines = [head]
    for recipe, of in rows.items():
        kl, agree = mean(r.kl for r in of), mean(r.agreement for r in of)
        size = of[0].device_bytes / of[0].full_bytes
        pre, dec = (mean(getattr(r, n) for r in of) for n in ("prefill_s", "decode_ms_per_token"))
        base = full.prefill_s, full.decode_ms_per_token
        lines.append(f"{recipe:34} {kl:8.4f} {agree:6.1%} {size:6.3f} {pre / base[0]:7.2f}x {dec / base[1]:6.2f}x")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a folder or hub id; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--recipe", action="append", help="instead of the usual ones; several times")
    parser.add_argument("--context", type=int, default=1536)
    parser.add_argument("--continuation", type=int, default=64)
    parser.add_argument("--texts", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model, tokenizer = calidrop.load(args.model)
    peers: dict[str, Callable[[], Cache]] = {
        "transformers DynamicCache, sdpa": lambda: DynamicCache(config=model.config),
    }
    if not any(layer_kinds(model.config).values()):  # it refuses models with sliding layers
        peers["transformers QuantizedCache fp8"] = lambda: QuantizedCache("fp8", model.config)
    recipes, rows = ["full", *args.recipe] if args.recipe else RECIPES, dict[str, list[Row]]()
    for i in range(args.texts):
        text = TEXT.read_text()[20000 + 45000 * i :]
        done = compare(model, tokenizer, text, recipes, args.context, args.continuation, peers=peers)
        for row in done:
            rows.setdefault(row.recipe, []).append(row)
        print(f"\n{i + 1} of {args.texts} texts, context {args.context}\n{table(rows)}", flush=True)
    if args.json:
        args.json.write_text(json.dumps([vars(r) for of in rows.values() for r in of], indent=1))


if __name__ == "__main__":
    main()
