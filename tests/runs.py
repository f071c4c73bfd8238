"""Folders of runs that nothing was run for: rows with plausible numbers, written as `calidrop eval` writes them."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from pathlib import Path

from calidrop.eval.rows import Row, append, empty, key_of
from calidrop.eval.sample import Sample
from calidrop.eval.table import Cell

FEW = (
    "full",
    "int8",
    "kivi(bits=2)",
    "snapkv(budget=128)",
    "snapkv(budget=128)+int4",
    "snapkv(budget=128)+calidrop(summary=16)",
    "transformers:DynamicCache",
)
SELECT = (
    *("streaming_llm", "h2o", "tova", "snapkv", "expected_attention", "pyramidkv", "adakv"),
    *("judge_q", "r_kv", "g_kv", "lazy_eviction"),
)
MANY = (
    *FEW,
    *(f"{name}(budget={n}){rest}" for n in (128, 256) for rest in ("", "+calidrop", "+int4") for name in SELECT),
    *("int4", "fp8", "kivi(bits=4)", "ott(bits=2)", "ott(bits=4)", "mixkvq", "decoquant(bits=4)", "think(keep=0.6)"),
    *("think(keep=0.6)+kivi(bits=2)", "snapkv(budget=256)+think(keep=0.6)+kivi(bits=4)+calidrop(summary=16)"),
    *("snapkv(budget=64)", "tova(budget=64)", "int8+snapkv(budget=512)", "adakv(budget=512)", "kivi(bits=8)"),
    *("h2o(budget=0.2)+mikv(bits=2)", "kvpress:SnapKVPress(0.9)", "kvpress:full", "transformers:QuantizedCache-fp8"),
)
FOUR: tuple[Cell, ...] = tuple(("smollm2", "needle", n, q) for n in (1024, 4096) for q in ("seen", "later"))
SIX: tuple[Cell, ...] = (*FOUR, ("smollm2", "fidelity", 1024, None), ("smollm2", "fidelity", 4096, None))


def write(
    run: Path,
    recipes: Sequence[str] = FEW,
    cells: Sequence[Cell] = SIX,
    samples: int = 5,
    failing: str = "",
) -> Path:
    """failing: the recipe of which every sample has an error."""
    run.mkdir(parents=True)
    rows = [_row(recipe, cell, i, recipe == failing) for cell in cells for i in range(samples) for recipe in recipes]
    append(run / "rows.jsonl", rows)
    told = {
        "settings": {"device": None, "dtype": None, "threads": 2, "seed": 0, "chat": False},
        "versions": {"python": "3.11.7", "calidrop": "0.1.0", "torch": "2.13.0+cpu", "transformers": "5.24.0"},
        "environment": {"cpu": "Intel(R) Xeon(R) Processor", "cores": 2, "system": "Linux"},
        "commands": [
            {"command": "calidrop eval --task 'needle <b>'", "time": "2026-11-25T00:41:14+00:00", "asked": {}}
        ],
    }
    (run / "run.json").write_text(json.dumps(told))
    return run


def _row(recipe: str, cell: Cell, index: int, fails: bool) -> Row:
    model, task, length, question = cell
    draw = random.Random(f"{recipe} {cell} {index}")
    nature = random.Random(recipe)
    share = 1.0 if recipe.endswith("full") else nature.uniform(0.02, 0.6)
    bad = 0.0 if share == 1 else (0.05 + nature.random() * 0.5) * (1 - share) ** 2 * (1.6 if question == "later" else 1)
    depth = (0.0, 0.25, 0.5, 0.75, 1.0)[index % 5] if task == "needle" else None
    metric = "string_match_all" if task == "needle" else "agreement"
    made = Sample(task, task, metric, f"{cell}", "?", "", ("7",), " 7", 8, length, index, depth)
    row = empty(made, model, recipe, question, key_of(made, model, recipe, question, {}))
    row.time, row.versions = "2026-11-25T00:41:23+00:00", {"torch": "2.13.0+cpu"}
    if fails:
        row.error = "RuntimeError: out of <memory>"
        return row
    row.kl = 0.0 if bad == 0 else bad * math.exp(draw.gauss(0, 0.4))
    row.kl_p95, row.agreement = 3 * row.kl, 1 / (1 + row.kl)
    row.score = float(draw.random() > 1.2 * bad) if task == "needle" else row.agreement
    row.nll, row.answer_tokens = 6 * (0.1 + 2 * row.kl), 6
    row.full_bytes = 46080 * length
    row.device_bytes = int(share * row.full_bytes)
    row.host_bytes = int(0.9 * row.full_bytes) if "calidrop" in recipe and "summary" not in recipe else 0
    row.prefill_s, row.recompute_rate = length / 700, 0.2 * bool(row.host_bytes)
    row.decode_ms_per_token = (30 + length / 80 * share**0.5) * draw.uniform(0.95, 1.05) * nature.uniform(0.8, 1.5)
    row.prediction = " 7"
    return row
