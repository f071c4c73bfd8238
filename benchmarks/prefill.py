"""What compressing costs a prompt: time of a prefill under each recipe over that of a plain one, in the same run.

python -m benchmarks.prefill [--contexts 1024,4096] [--recipe R ...] [--rounds 3] [--json OUT]

A page of The Time Machine goes through the model under transformers' DynamicCache with sdpa, and under our attention
for all recipes at once (`calidrop.tee`): what each took to compress stands for itself, so that other work on the
machine, which makes whole passes differ by a fifth, slows no recipe but all. Two passes are told apart, since the
attention of a prompt may find column sums on the way (`sums`: h2o). Recipes that run the prompt in a way of their own
(judge_q), and all on models whose layers are not all plain, get a pass each, in which compression is not told apart.
"over plain": the best pass with the best compression, over the best of DynamicCache, less 1; "compressing" is the
second of these alone, over the same.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache

import calidrop
from benchmarks.page import begin, options
from calidrop.plugin import ATTENTION, using
from calidrop.recipe import parse
from calidrop.support import check_model
from calidrop.support import plain as is_plain
from calidrop.tee import prefill

RECIPES = [
    *("full", "streaming_llm(budget=512)", "snapkv(budget=512)", "adakv(budget=512)", "h2o(budget=512)"),
    *("tova(budget=512)", "expected_attention(budget=512)", "g_kv(budget=512)", "r_kv(budget=512)"),
    *(
        "judge_q(budget=512)",
        "int4",
        "kivi(bits=4)",
        "snapkv(budget=512)+int4",
        "snapkv(budget=512)+kvcrush",
        "snapkv(budget=512)+calidrop",
    ),
]
PLAIN = "DynamicCache"
HEAD = f"{'context':>7} {'cache':34} {'best s':>8} {'compressing':>12} {'over plain':>11}"


@dataclass(frozen=True)
class Row:
    context: int
    cache: str
    best_s: float
    compressing: float | None  # None: not told apart from the pass
    over_plain: float


def plain(model: Any, ids: Tensor) -> float:
    """Seconds of one prefill into a DynamicCache."""
    if model.config._attn_implementation != "sdpa":
        model.set_attn_implementation("sdpa")
    start = time.perf_counter()
    model(ids, **using(DynamicCache(config=model.config)), logits_to_keep=1)
    return time.perf_counter() - start


def shared(model: Any, ids: Tensor, recipes: Sequence[str]) -> tuple[float, list[float]]:
    """Seconds of our attention with the model around it, and of each recipe's compression."""
    if model.config._attn_implementation != ATTENTION:
        model.set_attn_implementation(ATTENTION)
    start = time.perf_counter()
    if by_itself(model, recipes[0]):
        model(ids, **using(calidrop.KVCache(model, recipes[0], eager=True)), logits_to_keep=1)
        return time.perf_counter() - start, [0.0]
    caches = [calidrop.KVCache(model, recipe, eager=True) for recipe in recipes]
    own = prefill(model, caches, ids).own
    return time.perf_counter() - start - sum(own), own


def by_itself(model: Any, recipe: str) -> bool:
    """Whether it cannot share a pass with others."""
    return parse(recipe).alone or not is_plain(check_model(model))


def passes(model: Any, recipes: list[str]) -> list[list[str]]:
    """Recipes that are measured in one pass."""
    caches = {r: calidrop.KVCache(model, r) for r in recipes}
    alone = [[r] for r in recipes if by_itself(model, r)]
    rest = [r for r in recipes if [r] not in alone]
    sums = [r for r in rest if any(layer.sums for layer in caches[r].layers_here)]
    return [group for group in ([r for r in rest if r not in sums], sums, *alone) if group]


def measure(model: Any, ids: Tensor, recipes: list[str], rounds: int) -> list[Row]:
    groups = passes(model, recipes)
    for group in groups:  # thread pools and kernels start
        shared(model, ids[:, :64], group)
    base, best = [plain(model, ids)], [float("inf")] * len(groups)
    own = dict.fromkeys(recipes, float("inf"))
    for _ in range(rounds):
        base.append(plain(model, ids))
        for i, group in enumerate(groups):
            around, each = shared(model, ids, group)
            best[i] = min(best[i], around)
            own |= {r: min(own[r], s) for r, s in zip(group, each, strict=True)}
    least = min(base)
    found = {r: (best[i], own[r]) for i, group in enumerate(groups) for r in group}
    rows = [Row(ids.shape[1], PLAIN, least, None, 0.0)]
    for r in recipes:
        total, part = sum(found[r]), None if by_itself(model, r) else found[r][1] / least
        rows.append(Row(ids.shape[1], r, total, part, total / least - 1))
    return rows


def show(rows: list[Row]) -> None:
    for r in rows:
        part = "" if r.compressing is None else f"{r.compressing:.1%}"
        print(f"{r.context:7} {r.cache:34} {r.best_s:8.2f} {part:>12} {r.over_plain:+11.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--contexts", default="1024,4096")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    model, tokens, machine = begin(args)
    print(f"{machine}\n{HEAD}")
    found: list[Row] = []
    for context in map(int, args.contexts.split(",")):
        rows = measure(model, tokens[:, :context], args.recipe or RECIPES, args.rounds)
        show(rows)
        found += rows
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in found]}, indent=1))


if __name__ == "__main__":
    main()
