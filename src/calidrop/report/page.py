"""The page of a report."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import vl_convert

from calidrop.eval.table import MEANING
from calidrop.pages import code, render
from calidrop.report import charts
from calidrop.report.families import family, parts
from calidrop.report.gather import COSTS, QUALITIES, Report, Values

COLUMNS = (
    *(("recipe", "recipe", "text"), ("model", "model", "text"), ("task", "task", "text")),
    *(("length", "length", "count"), ("question", "question", "text"), ("n", "N", "count")),
    *(("score", "score", "score"), ("nll", "nll", "score"), ("kl", "KL", "small"), ("agreement", "agree", "share")),
    *(("device_bytes", "device MB", "megabytes"), ("host_bytes", "host MB", "megabytes"), ("ratio", "ratio", "times")),
    *(("prefill_s", "prefill s", "hundredth"), ("decode_ms_per_token", "ms/token", "tenth")),
    *(("decode_ratio", "decode", "times"), ("recompute_rate", "asked", "share")),
)
"""Of the table: field, head, and how page.js writes it."""
OWN = {
    "model": "which model", "task": "what is asked", "length": "tokens of the prompt, about",
    "question": "seen: in the compressed prompt; later: asked of the compressed cache",
}  # fmt: skip
CELL = ("model", "task", "length", "question")
USED = (
    *("cell", *(field for field, _, _ in COLUMNS if field not in CELL)),
    *("low", "high", "nll_low", "nll_high", "kl_low", "kl_high", "total_bytes", "errors"),
)


def page(report: Report) -> str:
    models = {cell[0] for cell in report.cells}
    columns = [
        {"field": field, "head": head, "kind": kind, "about": OWN.get(field) or MEANING[field]}
        for field, head, kind in COLUMNS
        if field != "model" or len(models) > 1
    ]
    recipes = list(dict.fromkeys(p["recipe"] for p in report.points))
    made = {recipe: parts(recipe) for recipe in recipes}
    payload = {
        "cells": [dict(zip(CELL, cell, strict=True)) for cell in report.cells],
        "recipes": [[recipe, family(recipe), [p.text for p in made[recipe]]] for recipe in recipes],
        "parts": {p.text: {"role": p.role, "says": p.says} for some in made.values() for p in some},
        "points": _table(report.points, USED, recipes),
        "spots": _table(report.spots, ("cell", "recipe", "depth", "n", "score", "nll"), recipes),
        "fronts": report.fronts,
        "columns": columns,
        "colours": charts.COLOURS,
        "qualities": charts.QUALITY,
        "costs": {name: words for name, (words, _) in charts.COST.items()},
        "models": len(models),
    }
    return render(
        "report/page.html",
        run=report,
        summary=_summary(report, recipes),
        qualities=charts.QUALITY,
        columns=columns,
        depths=bool(report.spots),
        payload=payload,
        specs=_specs(),
        vega=code(f"(() => {{{_vega()}}})();"),  # its short names are its own
    )


@lru_cache(1)
def _specs() -> Values:
    specs = {f"{q}/{c}": charts.spec(charts.pareto(q, c)) for q in QUALITIES for c in COSTS}
    return specs | {f"heat/{q}": charts.spec(charts.heat(q)) for q in ("score", "nll")}


@lru_cache(1)
def _vega() -> str:
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")


def _table(rows: list[Values], columns: tuple[str, ...], recipes: list[str]) -> Values:
    """Small: each name once, recipes as their indices, five digits."""
    index = {recipe: i for i, recipe in enumerate(recipes)}
    short = ({**row, "recipe": index[row["recipe"]]} for row in rows)
    return {"columns": columns, "values": [[_short(row[name]) for name in columns] for row in short]}


def _short(value: Any) -> Any:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def _summary(report: Report, recipes: list[str]) -> str:
    tasks, models, lengths = (list(dict.fromkeys(str(cell[i]) for cell in report.cells)) for i in (1, 0, 2))
    samples = max(p["n"] for p in report.points)
    told = [
        f"{len(recipes)} recipes", f"{', '.join(tasks)} at {', '.join(lengths)} tokens",
        f"up to {samples} samples each", ", ".join(models),
    ]  # fmt: skip
    return "; ".join(told)
