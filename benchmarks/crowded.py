"""Decode steps while other processes keep cores busy: what a step takes beside them, and without them.

python -m benchmarks.crowded [--busy 1] [--context 256] [--steps 10] [--rounds 4] [--recipe R ...] [--threads 2]

Medians over steps in turns, of one row. "torch" is DynamicCache on torch's linear layers, "DynamicCache" on ours.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from transformers import DynamicCache

import calidrop
from calidrop.plugin import using


def _spin() -> None:
    while True:
        pass


@contextmanager
def busy(processes: int) -> Any:
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=_spin, daemon=True) for _ in range(processes)]
    for other in others:
        other.start()
    try:
        yield
    finally:
        for other in others:
            other.kill()
            other.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", type=int, default=1)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--recipe", action="append")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    model, _ = calidrop.load()
    ids = torch.randint(3, 1000, (1, args.context))
    caches: dict[str, Any] = {name: DynamicCache(config=model.config) for name in ("torch", "DynamicCache")}
    caches |= {recipe: calidrop.KVCache(model, recipe) for recipe in args.recipe or ["full"]}
    for cache in caches.values():
        model(ids, **using(cache))

    def times() -> dict[str, float]:
        found: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(args.rounds):
            for name, cache in caches.items():
                calidrop.fast_linear(model, on=name != "torch")
                for _ in range(args.steps):
                    start = time.perf_counter()
                    model(torch.tensor([[5]]), **using(cache))
                    found[name].append(1e3 * (time.perf_counter() - start))
        return {name: median(x) for name, x in found.items()}

    alone = times()
    with busy(args.busy):
        time.sleep(1)
        beside = times()
    print(f"{'ms a step':24}     alone  beside {args.busy} busy, on {args.threads} threads")
    for name in caches:
        print(f"{name:24} {alone[name]:9.1f} {beside[name]:9.1f}")


if __name__ == "__main__":
    main()
