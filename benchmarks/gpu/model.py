"""Decoding with a model of Llama-3.1-8B's shape and random weights. Caches are filled with random keys and values and
compressed as after a prompt, rather than by running prompts, which would take most of the time and change no step."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any

import psutil
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.cache_utils import DynamicCache

from benchmarks.gpu.run import Run, show
from calidrop import KVCache, ops
from calidrop.attention import Queries
from calidrop.observe import Observation
from calidrop.plugin import using
from calidrop.tokens import Tokens

SHAPE = {
    "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 1 << 20,
    "rope_theta": 500000.0, "bos_token_id": 0, "eos_token_id": 1,
}  # fmt: skip
TINY = {
    "vocab_size": 97, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 32,
}  # fmt: skip
DYNAMIC = "DynamicCache, sdpa"
PRUNED = "DynamicCache of the budget, sdpa"  # what kvpress's SnapKVPress leaves behind
PYTHON = ", from Python"  # steps that are not recorded
WARM = 4
OBSERVED = 32  # queries that scores look at
COLUMNS = [("recipe", "40"), ("tokens", "7"), ("batch", "4"), ("ms_per_step", "8.2f"), ("tokens_s", "8.1f"),
           ("of_dynamic", "5.2f"), ("cache_gb", "7.2f"), ("peak_gb", "6.1f"), ("recomputed", "4.2f")]  # fmt: skip


def recipes(run: Run) -> list[str]:
    budget = "budget=40, recent=8" if run.tiny else "budget=2048"
    kivi = "kivi(bits=4, residual=9)" if run.tiny else "kivi(bits=4)"
    snap = f"snapkv({budget})"
    ours = ["full", snap, f"{snap}+int4", f"{snap}+calidrop(late=1)", kivi, "int4"]
    asked = [f"{snap}+calidrop{PYTHON}", f"{snap}+calidrop(refresh='host'){PYTHON}"]
    return [DYNAMIC, PRUNED, *ours, f"full{PYTHON}", f"{snap}{PYTHON}", *asked]


class Bench:
    """The model and the caches it is given."""

    def __init__(self, run: Run):
        self.run, self.dtype = run, torch.float32 if run.tiny else torch.bfloat16
        shape = {**SHAPE, **(TINY if run.tiny else {})}
        if run.layers:
            shape["num_hidden_layers"] = run.layers
        config = AutoConfig.for_model("llama", **shape)
        with torch.device(run.device):
            self.model = AutoModelForCausalLM.from_config(config, dtype=self.dtype, attn_implementation="sdpa").eval()
        self.config = self.model.config
        self.budget = 40 if run.tiny else 2048
        self.token_bytes = (
            2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * self.dtype.itemsize
        )

    def random(self, rows: int, heads: int, n: int) -> torch.Tensor:
        return torch.randn(rows, heads, n, self.config.head_dim, dtype=self.dtype, device=self.run.device)

    def filled(self, recipe: str, tokens: int, batch: int) -> Any:
        """Random for two rows, which the others repeat in memory of their own."""
        rows, H, Hq = min(batch, 2), self.config.num_key_value_heads, self.config.num_attention_heads
        if recipe in (DYNAMIC, PRUNED):
            self.model.set_attn_implementation("sdpa")
            tokens = tokens if recipe == DYNAMIC else min(tokens, self.budget)
            cache = DynamicCache(config=self.config)
            for i in range(self.config.num_hidden_layers):
                cache.update(self.random(rows, H, tokens), self.random(rows, H, tokens), i)
        else:
            graph = self.run.device.type == "cuda" and not recipe.endswith(PYTHON)
            cache = KVCache(self.model, recipe.removesuffix(PYTHON), graph=graph)
            pos = torch.arange(tokens, dtype=torch.int32, device=self.run.device)
            for layer in cache.layers:
                t = Tokens(
                    self.random(rows, H, tokens), self.random(rows, H, tokens), pos.expand(rows, H, -1), dense=True
                )
                self._prompt(layer, t, self.random(rows, Hq, min(OBSERVED, tokens)))
        if batch > rows:
            cache.batch_repeat_interleave(-(-batch // rows))
            if batch % rows:
                cache.batch_select_indices(torch.arange(batch, device=self.run.device))
        return cache

    def _prompt(self, layer: Any, t: Tokens, q: torch.Tensor) -> None:
        """What a layer's `attend` leaves behind after a prompt of these tokens whose last queries are q."""
        s, B, n = layer.state, len(t.pos), len(t)
        qs = Queries(q, t.pos[:, 0, -q.shape[2] :], q.shape[-1] ** -0.5)
        lse = torch.cat([ops.joined(qs.slice(i, i + 8), [ops.piece(t)])[1] for i in range(0, len(qs), 8)], 2)
        s.window.append(t)
        s.seen, s.context = n, torch.full((B,), n, device=t.pos.device)
        s.start = torch.zeros_like(s.context)
        layer.column_bytes = (t.k[:, :, :1].nbytes + t.v[:, :, :1].nbytes) // B
        layer.is_initialized = True
        if s.store is not None:
            step = Observation(qs, lse, s.context, s.start)
            s.store.observe(step)
            s.obs, s.due = step.last(layer.plan.observe).copied(), layer.plan.prompts
            layer.settle()

    @torch.no_grad()
    def decoded(self, recipe: str, tokens: int, batch: int, steps: int) -> dict:
        """Steps of greedy decoding, the first few not timed: they compile kernels and record."""
        run = self.run
        cache = self.filled(recipe, tokens, batch)
        run.clear()
        ids = torch.randint(2, self.config.vocab_size, (batch, 1), device=run.device)
        for i in range(steps + WARM):
            if i == WARM:
                run.sync()
                start = time.perf_counter()
            ids = self.model(ids, use_cache=True, **using(cache)).logits[:, -1:].argmax(-1)
        run.sync()
        step = (time.perf_counter() - start) / steps
        held = cache.nbytes if isinstance(cache, KVCache) else self.token_bytes * batch * (tokens + steps + WARM)
        row = {"ms_per_step": step * 1e3, "tokens_s": batch / step, "cache_gb": held / 1e9}
        if run.device.type == "cuda":
            row["peak_gb"] = torch.cuda.max_memory_allocated() / 1e9
        if isinstance(cache, KVCache):
            by = {layer.by for layer in cache.layers}
            passed = by == {ops.GPU.name} and (cache.steps is None or "replayed" in cache.steps.describe())
            row |= {"recomputed": cache.recompute_rate, "by": sorted(by), "passed": passed}
            row |= {"steps": "from Python" if cache.steps is None else cache.steps.describe()}
        return row

    def fits(self, recipe: str, tokens: int, batch: int) -> str:
        """Why not to try; "" where it may fit. While it fills, one layer of two rows is there uncompressed."""
        whole = self.token_bytes * tokens * batch
        if recipe.removesuffix(PYTHON) in (DYNAMIC, "full") and whole > 0.95 * self.run.free():
            return "does not fit"
        if recipe.startswith(("int4", "kivi")) and whole * 0.3 > 0.95 * self.run.free():
            return "does not fit"
        if "calidrop" in recipe and 2.2 * whole > psutil.virtual_memory().available:
            return "does not fit the host's memory"
        return ""


def decoding(run: Run) -> Iterator[dict]:
    """Milliseconds per step, the bytes of the cache, the peak while decoding."""
    bench = Bench(run)
    cases = [(48, 1)] if run.tiny else [
        (32, 8), (32, 1), (8, 32), (128, 1), (32, 32), (8, 8), (8, 1), (128, 8), (128, 32)
    ]  # fmt: skip
    for thousands, batch in cases:
        tokens, dynamic = thousands if run.tiny else thousands * 1024, None
        for recipe in recipes(run):
            row: dict = {"recipe": recipe, "tokens": tokens, "batch": batch}
            if recipe.endswith(PYTHON) and thousands * batch > 32 * 8:
                continue
            if why := bench.fits(recipe, tokens, batch):
                yield show(row | {"error": why}, COLUMNS)
                continue
            measure = functools.partial(bench.decoded, recipe, tokens, batch, 2 if run.tiny else 16)
            row = run.guarded(row, measure)
            if "ms_per_step" in row:
                dynamic = row["ms_per_step"] if recipe == DYNAMIC else dynamic
                row["of_dynamic"] = dynamic / row["ms_per_step"] if dynamic else None
            yield show(row, COLUMNS)


def largest(run: Run) -> Iterator[dict]:
    """The largest batch that decodes at 32k tokens: by the bytes of a row, then tried, a tenth less where it fails."""
    bench = Bench(run)
    tokens = 48 if run.tiny else 32 * 1024
    some = [recipe for recipe in recipes(run) if not recipe.endswith(PYTHON) and recipe != PRUNED]
    for recipe in some[: 3 if run.tiny else None]:
        row: dict = {"recipe": recipe, "tokens": tokens}
        if "calidrop" in recipe:
            yield show(row | {"error": "bounded by host memory: not measured"}, COLUMNS)
            continue
        yield show(run.guarded(row, functools.partial(_largest, bench, recipe, tokens)), COLUMNS)


def _largest(bench: Bench, recipe: str, tokens: int) -> dict:
    one, two = (bench.decoded(recipe, tokens, batch, 1)["cache_gb"] for batch in (1, 2))
    bench.run.clear()
    # logits of all words, a few times
    batch = min(4096, int(0.9 * bench.run.free() / ((two - one) * 1e9 + 6 * bench.config.vocab_size)))
    batch = 3 if bench.run.tiny else max(1, batch)
    for _ in range(4):
        try:
            return {"batch": batch} | bench.decoded(recipe, tokens, batch, 2)
        except torch.OutOfMemoryError:
            batch = max(1, batch * 9 // 10)
        bench.run.clear()  # here, where the error no longer holds the cache
    raise RuntimeError(f"not even a batch of {batch}")
