"""What huge pages are worth: the same decode attention, and a model's linear layers, in pages of 4 kB and of 2 MB.

python -m benchmarks.huge [--tokens 4096] [--model M] [--dtype bfloat16] [--rounds 40] [--threads 2]

In turn in one process on cold caches, medians. Linear layers are those of the embedded model for one row, loaded in a
dtype that its file is not in (what is mapped from a file stays as it is).
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from torch import nn

import calidrop
from benchmarks.kernel import FORMATS, cases
from calidrop import huge
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer


def timed(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return 1e6 * (time.perf_counter() - start)


def attention(tokens: int, rounds: int) -> None:
    layer = Layer(0, 1, 32, 8, 128, None, HeadGroup())
    with patch.object(huge, "there", lambda: False):
        plain = cases(layer, tokens)
    large = cases(layer, tokens)
    print(f"{tokens:,} tokens, 8 kv heads of 128       us, 4 kB  us, 2 MB  ratio")
    for name in FORMATS:
        found: tuple[list[float], list[float]] = [], []
        for i in range(rounds):
            for which in (0, 1) if i % 2 else (1, 0):
                plain["copy"][1]()
                found[which].append(timed((plain, large)[which][name][1]))
        a, b = map(median, found)
        print(f"{name:34} {a:10.0f} {b:9.0f} {b / a:6.2f}")


def linear(name: str | None, dtype: str, rounds: int) -> None:
    with patch.object(huge, "there", lambda: False):
        model, _ = calidrop.load(*([name] if name else []), dtype=dtype)
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    rows = [torch.randn(1, 1, m.in_features, dtype=m.weight.dtype) for m in layers]

    def once() -> None:
        for layer, row in zip(layers, rows, strict=True):
            layer(row)

    before = median(timed(once) for _ in range(rounds))
    start = time.perf_counter()
    moved = huge.moved(m.weight for m in layers)
    took = time.perf_counter() - start
    after = median(timed(once) for _ in range(rounds))
    print(f"{f'linear layers, {dtype}':34} {before:10.0f} {after:9.0f} {after / before:6.2f}")
    print(f"{moved / 1e6:.0f} MB of weights were moved in {took:.2f} s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--model", help="a folder or hub id; default: the embedded SmolLM2-135M-Instruct")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    if not huge.there():
        raise SystemExit("this system gives programs no huge pages")
    attention(args.tokens, args.rounds)
    linear(args.model, args.dtype, args.rounds)


if __name__ == "__main__":
    main()
