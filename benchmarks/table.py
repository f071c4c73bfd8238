"""The table: every method, alone and with what it goes with, at three budgets, on needles and on pages of a book.

python -m benchmarks.table --out RUN [--model smollm2] [--lengths 1024,2048] [--needles 40] [--pages 12] [--workers 1]

A run that was stopped goes on where it was. Budgets are shares of the prompt. `calidrop report RUN` draws it. kvpress
runs in its own environment: `benchmarks/kvpress_rows.py` says how its rows get into the same folder.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from calidrop.eval.run import Ask, How, run
from calidrop.eval.workers import here, processes
from calidrop.eval_cli import print_table, progress
from calidrop.terminal import stdout

BUDGETS = (0.25, 0.125, 0.0625)
EVICTORS = (
    *("streaming_llm", "h2o", "tova", "snapkv", "pyramidkv", "adakv", "expected_attention", "g_kv", "snapkv+kvcrush"),
    "judge_q",
)
STORAGE = (
    *("int8", "fp8", "int4", "kivi(bits=4)", "kivi(bits=2)", "ott", "mixkvq", "decoquant", "think(keep=0.6)"),
    "think(keep=0.6)+int4",
)
PEERS = ("transformers:DynamicCache", "transformers:QuantizedCache-fp8")
SMALL = ("streaming_llm", "h2o", "snapkv", "adakv", "expected_attention", "snapkv+kvcrush")


def recipes(embedded: bool) -> list[str]:
    """embedded: the model has shipped weights for the trained methods; for another, fewer recipes at one budget."""
    if not embedded:
        evictors = [sized(name, 0.25) for name in SMALL]
        stored = [*STORAGE, "snapkv(budget=0.25)+kivi(bits=4)", "h2o(budget=0.25)+mikv(bits=4)"]
        return [*evictors, *(f"{e}+calidrop" for e in evictors), *stored, PEERS[0]]
    evictors = [sized(name, b) for b in BUDGETS for name in EVICTORS]
    mixed = [f"{e}{more}" for b in BUDGETS for e, more in (
        (sized("snapkv", b), "+int4"), (sized("snapkv", b), "+int4+calidrop"),
        (sized("snapkv", b), "+calidrop(offload=False, summary=16)"), (sized("h2o", b), "+mikv(bits=4)"),
    )]  # fmt: skip
    more = [sized("r_kv", 0.125), "judge_q(budget=0.125)+int4", "h2o(budget=0.125)+mikv(bits=2)"]
    more += [f"snapkv(budget={b}, kernel=1)" for b in BUDGETS]
    predictor = [f"attention_predictor(budget={b}, sinks=16, recent=32)" for b in BUDGETS]
    more += ["adakv(budget=0.25)+kivi(bits=2)", "adakv(budget=0.25)+kivi(bits=4)"]
    calibrated = [
        f"{e}+calidrop" for e in evictors if "judge_q" not in e or "0.125" in e
    ]  # each is a prefill of its own
    return [*evictors, *calibrated, *mixed, *more, *predictor, *STORAGE, *PEERS]


def sized(name: str, budget: float) -> str:
    first, *rest = name.split("+")
    return "+".join([f"{first}(budget={budget})", *rest])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--lengths", default="1024,2048")
    parser.add_argument("--needles", type=int, default=40)
    parser.add_argument("--pages", type=int, default=12)
    parser.add_argument("--workers", type=int, default=1)
    args = parser.parse_args()
    how = How(threads=1)
    chosen = tuple(recipes(args.model == "smollm2"))
    command = shlex.join(["python", "-m", "benchmarks.table", *sys.argv[1:]])
    workers = here(how) if args.workers == 1 else processes(args.workers, how)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    made = []
    with progress() as tick:
        for length in map(int, args.lengths.split(",")):
            for task, n in (("needle", args.needles), ("fidelity", args.pages)):
                ask = Ask((args.model,), chosen, (task,), lengths=(length,), samples=n, together=32, timed=2)
                made = run(ask, how, args.out, workers, command, tick=tick)
    print_table(stdout(), made)


if __name__ == "__main__":
    main()
