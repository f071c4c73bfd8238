"""Decoding end to end: time per step and bytes held, beside transformers' own caches in the same run.

python -m benchmarks.decode [--contexts 2048,4096,8192] [--batches 1,4] [--recipe R ...] [--json OUT] [--plot PNG]
                            [--dtype D] [--compiled] [--proposed N] [--kvpress PYTHON] [--openvino PYTHON]

A page of The Time Machine is run once per context and fills every cache; more rows are copies of the first. Then all
caches take a few steps in turn, in rounds, so that other work on the machine slows all alike. "times" is the step of
transformers' DynamicCache with sdpa divided by the recipe's, at the same context and batch, best step against best
step. "DynamicCache of 512 tokens" is what evicting to 512 tokens could reach at most. --proposed: steps as speculative
decoding takes them, of N tokens, all but one of which are taken back.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, QuantizedCache

import calidrop
from benchmarks.page import begin, options
from calidrop import ops
from calidrop.linear import Linear, fast_linear
from calidrop.models import embedded, embedded_gguf
from calidrop.plugin import ATTENTION, using
from calidrop.state import held_bytes
from calidrop.support import layer_kinds, plain
from calidrop.tee import prefill

RECIPES = [
    "full",
    "snapkv(budget=512)",
    "adakv(budget=512)",
    "snapkv(budget=512)+calidrop(offload=False, summary=16)",
    "snapkv(budget=512)+calidrop",
    "int8",
    "int4",
    "kivi(bits=4)",
    "snapkv(budget=512)+int4",
]
KEPT = 512  # tokens, by everything that evicts
KVPRESS, OPENVINO = "kvpress {kvpress}, transformers {transformers}", "OpenVINO GenAI {openvino_genai}"
FULL, SHORT, FP8 = "DynamicCache", f"DynamicCache of {KEPT} tokens", "QuantizedCache fp8"
STOCK = f"{FULL}, torch's linear layers"


@dataclass(frozen=True)
class Row:
    """best_ms, median_ms: one decode step of the whole batch. device_bytes: None where nobody tells."""

    context: int
    batch: int
    cache: str
    best_ms: float
    median_ms: float
    device_bytes: int | None
    times: float


class Bench:
    def __init__(self, model: Any, recipes: list[str], compiled: bool = False, proposed: int = 1):
        self.model, self.recipes, self.compiled, self.proposed = model, recipes, compiled, proposed

    def step(self, cache: Cache, ids: Tensor) -> float:
        """Seconds of one forward pass."""
        own = ATTENTION if isinstance(cache, calidrop.KVCache) else "sdpa"
        if self.model.config._attn_implementation != own:
            self.model.set_attn_implementation(own)
        start = time.perf_counter()
        self.model(ids, **using(cache), logits_to_keep=1)
        return time.perf_counter() - start

    def turn(self, cache: Cache, ids: Tensor) -> float:
        """Seconds of a step behind which one token stays."""
        seconds, start = self.step(cache, ids), time.perf_counter()
        if ids.shape[1] > 1:
            cache.crop(1 - ids.shape[1])
        return seconds + time.perf_counter() - start

    def filled(self, ids: Tensor) -> dict[str, Cache]:
        """Every cache after the prompt ids [1,T]."""
        config = self.model.config
        made: dict[str, Cache] = {FULL: DynamicCache(config=config), SHORT: DynamicCache(config=config)}
        usual = plain(config) and not any(layer_kinds(config).values())  # it refuses sliding layers
        if self.proposed == 1 and usual:  # and it cannot undo
            try:
                made[FP8] = QuantizedCache("fp8", config)
            except ValueError as error:  # versions of transformers that know no fp8
                print(f"{FP8} is left out: {error}")
        if any(isinstance(layer, Linear) for layer in self.model.modules()):
            made[STOCK] = DynamicCache(config=config)
        for name, cache in made.items():
            self.step(cache, ids[:, :KEPT] if name == SHORT else ids)
        ours = {recipe: calidrop.KVCache(self.model, recipe, eager=True) for recipe in self.recipes}
        if self.compiled:
            ours |= {f"{r}, compiled": calidrop.KVCache(self.model, r, eager=True, compile=True) for r in self.recipes}
        if plain(config):
            prefill(self.model, list(ours.values()), ids)
        else:
            for cache in ours.values():
                self.step(cache, ids)
        for cache in ours.values() if self.proposed > 1 else ():
            cache.activate_past_recording()
        return made | ours

    def measure(self, caches: dict[str, Cache], ids: Tensor, rounds: int, steps: int) -> dict[str, list[float]]:
        seconds: dict[str, list[float]] = {name: [] for name in caches}
        for _ in range(rounds):
            for name, cache in caches.items():
                fast_linear(self.model, name != STOCK)
                self.turn(cache, ids)  # what the others pushed out of the processor's caches comes back
                seconds[name] += [self.turn(cache, ids) for _ in range(steps)]
        return seconds


def size(cache: Cache) -> int:
    if isinstance(cache, calidrop.KVCache):
        return cache.nbytes
    return held_bytes([vars(layer) for layer in cache.layers])


def told(python: Path, script: str, label: str, model: dict[str, str], ids: Tensor, *of: int) -> dict[str, Any]:
    """What a script beside this one tells, run by another python. label: of its versions. of: batch, rounds, steps."""
    job = {**model, "ids": ids[0].tolist(), **dict(zip(("batch", "rounds", "steps"), of, strict=True)), "kept": KEPT,
           "threads": torch.get_num_threads()}  # fmt: skip
    file = Path(__file__).with_name(script)
    done = subprocess.run([str(python), str(file)], input=json.dumps(job), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{python} {file} failed:\n{done.stderr}")
    found = json.loads(done.stdout.splitlines()[-1])  # libraries print too
    label = label.format(**{name.replace("-", "_"): x for name, x in found["versions"].items()})
    return {key: {f"{label}: {name}": x for name, x in found[key].items()} for key in ("seconds", "bytes")}


Peer = Callable[[Tensor, int, int, int], dict[str, Any]]


def rows(
    bench: Bench,
    ids: Tensor,
    batches: list[int],
    rounds: int,
    steps: int,
    say: Callable[[str], None],
    peers: Sequence[Peer] = (),
) -> list[Row]:
    caches, found, have = bench.filled(ids), [], 1
    for batch in batches:
        if batch != have:
            caches.pop(FP8, None)  # its layers cannot be repeated
            for cache in caches.values():
                cache.batch_repeat_interleave(batch // have)
            have = batch
        seconds = bench.measure(caches, ids[:, -bench.proposed :].expand(batch, -1), rounds, steps)
        base, held = min(seconds[FULL]), {name: size(cache) for name, cache in caches.items()}
        for peer in peers:
            more = peer(ids, batch, rounds, steps)
            seconds |= more["seconds"]
            held |= more["bytes"]
        for name, of in seconds.items():
            row = Row(ids.shape[1], batch, name, 1000 * min(of), 1000 * median(of), held[name], base / min(of))
            mb = "?" if row.device_bytes is None else f"{row.device_bytes / 1e6:.1f}"
            say(
                f"{row.context:7} {batch:5} {name:56} {row.best_ms:9.1f} {row.median_ms:9.1f} {mb:>8} {row.times:6.2f}x"
            )
            found.append(row)
    return found


def plot(found: list[Row], title: str, file: Path) -> None:
    """Ours as lines, what others do dashed; a line's colour is the same at every batch."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

    batches, names = sorted({row.batch for row in found}), list(dict.fromkeys(row.cache for row in found))
    figure, axes = plt.subplots(1, len(batches), figsize=(4.5 * len(batches) + 4, 5), sharey=True, squeeze=False,
                                layout="constrained")  # fmt: skip
    colours, lengths = plt.get_cmap("tab20"), sorted({row.context for row in found})
    for ax, batch in zip(axes[0], batches, strict=True):
        for i, name in enumerate(names):
            of = [row for row in found if (row.batch, row.cache) == (batch, name)]
            ours = name not in (FULL, SHORT, STOCK, FP8) and ": " not in name  # peers' names begin with their version
            contexts, ms = [r.context for r in of], [r.best_ms for r in of]
            ax.plot(contexts, ms, "-o" if ours else "--x", color=colours(i % 20), label=name)
        ax.set(title=f"batch {batch}", xlabel="context, tokens", xscale="log", yscale="log")
        ax.set_xticks(lengths, labels=map(str, lengths))
        ax.xaxis.set_minor_locator(NullLocator())
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(ScalarFormatter())
        ax.yaxis.set_minor_locator(NullLocator())
        ax.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("ms per step")
    lines = {line.get_label(): line for ax in axes[0] for line in ax.get_lines()}
    figure.suptitle(title, fontsize=9)
    figure.legend(lines.values(), lines.keys(), loc="outside right upper", fontsize=7)
    figure.savefig(file, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options(parser)
    parser.add_argument("--contexts", default="2048,4096,8192")
    parser.add_argument("--batches", default="1,4", help="each a multiple of the one before")
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--steps", type=int, default=6, help="of each cache in each round")
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--compiled", action="store_true", help="every recipe compiled too; minutes at the first step")
    parser.add_argument("--proposed", type=int, default=1, help="tokens of a step, of which one stays")
    parser.add_argument("--kvpress", type=Path, help="a python that has kvpress")
    parser.add_argument("--openvino", type=Path, help="a python that has openvino-genai")
    parser.add_argument("--gguf", type=Path, help="of the same model, for it; default: the embedded one's")
    args = parser.parse_args()
    if args.proposed < 1 or (args.proposed > 1 and (args.compiled or args.kvpress or args.openvino)):
        parser.error(f"--proposed must be 1 or more, and 1 beside --compiled and other libraries, got {args.proposed}")
    model, tokens, machine = begin(args)
    print(f"{machine}; {ops.backend(torch.device('cpu'))}")
    print(f"{'context':>7} {'batch':>5} {'cache':56} {'best ms':>9} {'median ms':>9} {'MB':>8} {'times':>7}")
    found: list[Row] = []
    peers = []
    if args.kvpress:
        own = {"model": str(args.model or embedded()), "dtype": str(model.dtype).removeprefix("torch.")}
        peers.append(partial(told, args.kvpress, "decode_kvpress.py", KVPRESS, own))
    if args.openvino:
        own = {"gguf": str(args.gguf or embedded_gguf())}
        peers.append(partial(told, args.openvino, "decode_openvino.py", OPENVINO, own))
    for context in map(int, args.contexts.split(",")):
        batches = [int(b) for b in args.batches.split(",")]
        bench = Bench(model, args.recipe or RECIPES, args.compiled, args.proposed)
        say = partial(print, flush=True)
        found += rows(bench, tokens[:, :context], batches, args.rounds, args.steps, say, peers)
        if args.json:
            args.json.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in found]}, indent=1))
    if args.plot:
        plot(found, machine, args.plot)


if __name__ == "__main__":
    main()
