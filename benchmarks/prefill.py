"""What compressing costs a prompt: time of a prefill under each recipe over that of a plain one, in the same run.

python -m benchmarks.prefill [--contexts 1024,4096] [--recipe R ...] [--rounds 3] [--json OUT]

A page of The Time Machine goes through the model under transformers' DynamicCache with sdpa and under every recipe in
turn, in rounds, so that other work on the machine slows all alike. "over plain": the best time over the best of
DynamicCache. "full" is our own attention without compression, so what stands above it is compression alone.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

import calidrop
from benchmarks.page import begin, options
from calidrop.plugin import ATTENTION, using

RECIPES = [
    *("full", "streaming_llm(budget=512)", "snapkv(budget=512)", "adakv(budget=512)", "h2o(budget=512)"),
    *("tova(budget=512)", "expected_attention(budget=512)", "g_kv(budget=512)", "judge_q(budget=512)"),
    *("int4", "kivi(bits=4)", "snapkv(budget=512)+int4", "snapkv(budget=512)+kvcrush", "snapkv(budget=512)+calidrop"),
]
PLAIN = "DynamicCache"


@dataclass(frozen=True)
class Row:
    context: int
    cache: str
    best_s: float
    median_s: float
    over_plain: float


def once(model: Any, name: str, ids: Tensor) -> float:
    """Seconds of one prefill into a new cache."""
    own = "sdpa" if name == PLAIN else ATTENTION
    cache: Cache = DynamicCache(config=model.config) if name == PLAIN else calidrop.KVCache(model, name, eager=True)
    if model.config._attn_implementation != own:
        model.set_attn_implementation(own)
    start = time.perf_counter()
    model(ids, **using(cache), logits_to_keep=1)
    return time.perf_counter() - start


def measure(model: Any, ids: Tensor, recipes: list[str], rounds: int) -> list[Row]:
    seconds: dict[str, list[float]] = {name: [] for name in (PLAIN, *recipes)}
    for name in seconds:
        once(model, name, ids[:, :64])  # thread pools and kernels start
    for _ in range(rounds):
        for name, of in seconds.items():
            of.append(once(model, name, ids))
    base = min(seconds[PLAIN])
    return [Row(ids.shape[1], name, min(of), median(of), min(of) / base - 1) for name, of in seconds.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--contexts", default="1024,4096")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokens, machine = begin(args)
    print(f"{machine}\n{'context':>7} {'cache':34} {'best s':>8} {'median s':>9} {'over plain':>11}")
    found: list[Row] = []
    for context in map(int, args.contexts.split(",")):
        rows = measure(model, tokens[:, :context], args.recipe or RECIPES, args.rounds)
        for r in rows:
            print(f"{r.context:7} {r.cache:34} {r.best_s:8.2f} {r.median_s:9.2f} {r.over_plain:+10.1%}", flush=True)
        found += rows
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in found]}, indent=1))


if __name__ == "__main__":
    main()
