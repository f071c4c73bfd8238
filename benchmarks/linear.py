"""Linear layers of a model on a CPU: all of them once, as torch runs them and as `calidrop.fast_linear` has them run.

python -m benchmarks.linear [--rows 1,2,4,8,64,512,2048] [--rounds 5] [--model M] [--dtype D] [--json OUT]

Rows: of a decode step its batch, of a prompt its tokens; the head runs up to 64 only, as prompts ask for one row of
it. Both take turns in one run, best against best. "GB/s": the weights' bytes over our time. More than eight rows are
torch's in both, in bf16 and on processors that are not AMD's.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.page import begin, options
from calidrop.linear import fast_linear

HEAD = 64  # rows up to which the head takes part


@dataclass(frozen=True)
class Row:
    rows: int
    torch_ms: float
    ours_ms: float
    gb_s: float
    times: float


def once(layers: list[nn.Linear], inputs: dict[int, Tensor]) -> float:
    """Milliseconds of all layers, each on its input."""
    start = time.perf_counter()
    for layer in layers:
        layer(inputs[layer.in_features])
    return 1000 * (time.perf_counter() - start)


def measure(model: Any, rows: int, rounds: int) -> Row:
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    layers = [m for m in layers if rows <= HEAD or m is not model.get_output_embeddings()]
    inputs = {width: torch.randn(rows, width, dtype=model.dtype) for width in {m.in_features for m in layers}}
    best = {False: float("inf"), True: float("inf")}
    for _ in range(rounds):
        for on in best:
            fast_linear(model, on)
            once(layers, inputs)  # what the first call of a shape sets up
            best[on] = min(best[on], once(layers, inputs))
    held = sum(m.weight.nbytes for m in layers)
    return Row(rows, best[False], best[True], held / best[True] / 1e6, best[False] / best[True])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--rows", default="1,2,4,8,64,512,2048")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    model, _, machine = begin(args)
    print(f"{machine}\n{'rows':>6} {'torch ms':>9} {'ours ms':>9} {'GB/s':>6} {'times':>6}")
    found = []
    for count in map(int, args.rows.split(",")):
        row = measure(model, count, args.rounds)
        found.append(row)
        print(f"{row.rows:6} {row.torch_ms:9.1f} {row.ours_ms:9.1f} {row.gb_s:6.1f} {row.times:5.2f}x", flush=True)
    if args.json:
        args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in found]}, indent=1))


if __name__ == "__main__":
    main()
