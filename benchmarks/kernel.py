"""Decode attention alone: bytes read per second, against copying memory on the same machine.

python -m benchmarks.kernel [--lengths 4096,32768,131072] [--threads 2] [--json OUT] [--plot PNG]

Head shapes of Llama-3.1-8B (8 kv heads of 128, 32 query heads) unless said otherwise. A copy reads and writes, and both
count; the bytes of a format are those of its keys, values, codes and scales, read once. The best of some rounds, in
which everything is measured in turn, so that other work on the machine slows all alike. "torch" is scaled dot product
attention on the exact tokens with the query group packed as rows, so that it too reads keys once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from calidrop import ops
from calidrop.attention import Queries
from calidrop.observe import Observation
from calidrop.parallel import HeadGroup
from calidrop.parts import Layer
from calidrop.recipe import parse
from calidrop.store import Exact, Store
from calidrop.tokens import Tokens

FORMATS = {  # name -> what stores it (exact if nothing), and what it is made from
    "exact fp32": ("", torch.float32),
    "exact bf16": ("", torch.bfloat16),
    "int8": ("int8", torch.bfloat16),
    "int4": ("int4", torch.bfloat16),
    "kivi(bits=4)": ("kivi(bits=4)", torch.bfloat16),
    "kivi(bits=2)": ("kivi(bits=2)", torch.bfloat16),
}
STEP = 16384  # tokens encoded at once


def stored(recipe: str, layer: Layer, n: int, dtype: torch.dtype) -> Store:
    """A store with n random tokens in each head."""
    store = parse(recipe).plan(layer).store if recipe else Exact()
    assert store is not None
    told: Any = Observation(Queries(torch.zeros(1, 1, 1, 1), torch.zeros(1, 1), 1.0), *[torch.zeros(1)] * 3)  # unread
    for start in range(0, n, STEP):
        shape = 1, layer.kv_heads, min(STEP, n - start), layer.head_dim
        pos = torch.arange(start, start + shape[2], dtype=torch.int32).expand(shape[:3])
        store.add(Tokens(torch.randn(shape).to(dtype), torch.randn(shape).to(dtype), pos, dense=True), told)
    return store


def read_bytes(parts: list) -> int:
    return sum(x.nbytes for part in parts for name, x in part.columns.items() if name != "pos")


def cases(layer: Layer, n: int) -> dict[str, tuple[int, Callable[[], Any]]]:
    """name -> bytes it moves, and the call."""
    found: dict[str, tuple[int, Callable[[], Any]]] = {}
    for name, (recipe, dtype) in FORMATS.items():
        store = stored(recipe, layer, n, dtype)
        qs = Queries(torch.randn(1, layer.query_heads, 1, layer.head_dim), torch.full((1, 1), n), layer.head_dim**-0.5)
        parts = store.attend(qs)
        found[name] = read_bytes(parts), lambda qs=qs, parts=parts: ops.joined(qs, parts)
        if not recipe:
            t = store.tokens()[0]
            q = qs.q.view(1, layer.kv_heads, -1, layer.head_dim).to(dtype)
            found[str(dtype).replace(".", " ")] = (
                t.k.nbytes + t.v.nbytes,
                lambda q=q, k=t.k, v=t.v: F.scaled_dot_product_attention(q, k, v),
            )
    largest = max(size for size, _ in found.values())
    source, target = torch.ones(largest // 4), torch.empty(largest // 4)
    found["copy"] = 2 * largest, lambda: target.copy_(source)
    return found


def best(found: dict[str, tuple[int, Callable[[], Any]]], rounds: int) -> dict[str, float]:
    """Seconds of the fastest call of each."""
    times = dict.fromkeys(found, float("inf"))
    for _ in range(rounds):
        for name, (_, call) in found.items():
            start = time.perf_counter()
            call()
            times[name] = min(times[name], time.perf_counter() - start)
    return times


def plot(rows: list[dict], file: Path) -> None:
    import matplotlib.pyplot as plt

    lengths = sorted({row["tokens"] for row in rows})
    names = list(dict.fromkeys(row["format"] for row in rows if row["format"] != "copy"))
    figure, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    width = 0.8 / len(lengths)
    for i, n in enumerate(lengths):
        share = [next(r["of_copy"] for r in rows if (r["format"], r["tokens"]) == (name, n)) for name in names]
        axes.bar([x + i * width for x in range(len(names))], share, width, label=f"{n:,} tokens")
    axes.set_xticks([x + 0.4 - width / 2 for x in range(len(names))], names, rotation=20)
    axes.set_ylabel("bytes per second, of a copy's")
    axes.axhline(1, color="gray", linewidth=0.8)
    axes.legend()
    figure.savefig(file, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lengths", default="4096,32768,131072")
    parser.add_argument("--query-heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--plot", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.set_grad_enabled(False)
    layer = Layer(0, 1, args.query_heads, args.kv_heads, args.head_dim, None, HeadGroup())
    print(f"{ops.backend(torch.device('cpu'))}; torch {torch.__version__}, {args.threads} threads")
    rows: list[dict] = []
    for n in map(int, args.lengths.split(",")):
        found = cases(layer, n)
        times = best(found, args.rounds)
        speed = {name: size / times[name] for name, (size, _) in found.items()}
        print(f"\n{n:,} tokens{'':11} {'MB':>9} {'ms':>9} {'GB/s':>7} {'of copy':>8} {'tokens/s of torch fp32':>24}")
        for name, (size, _) in found.items():
            row = {
                "format": name, "tokens": n, "bytes": size, "seconds": times[name],
                "of_copy": speed[name] / speed["copy"], "against_torch": times["torch float32"] / times[name],
            }  # fmt: skip
            rows.append(row)
            print(
                f"{name:24} {size / 1e6:9.1f} {1e3 * times[name]:9.3f} {speed[name] / 1e9:7.1f} {row['of_copy']:8.0%} "
                f"{'' if name == 'copy' else format(row['against_torch'], '.2f') + 'x':>24}"
            )
    if args.json:
        args.json.write_text(json.dumps({"threads": args.threads, "torch": torch.__version__, "rows": rows}, indent=1))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
