"""All that a report shows of a run's folder, as plain data."""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from calidrop.eval.rows import Row, latest
from calidrop.eval.score import interval
from calidrop.eval.table import Cell, Line, nll_of, table
from calidrop.pareto import front

Values = dict[str, Any]

QUALITIES = {"score": -1, "nll": 1, "kl": 1}
"""Numbers that say how good a recipe is, and whether smaller (1) or larger (-1) is better."""
COSTS = ("device", "total", "decode")
"""MB on the device, MB on device and host, milliseconds per token."""


@dataclass(frozen=True)
class Report:
    """cells: what was asked (a model, task, length, question). points: a recipe in a cell, the fields of a table's line
    and `cell` (its index), `total_bytes`, `nll_low` … `kl_high`. fronts: by cell, then by "quality/cost", the indices
    of the points that no other beats, cheapest first, equal ones together. spots: a recipe in a cell at one depth.
    failures: errors with how often they came. told: run.json, empty where there is none. sources: versions that made
    rows."""

    name: str
    cells: list[Cell]
    points: list[Values]
    fronts: list[dict[str, list[list[int]]]]
    spots: list[Values]
    failures: list[Values]
    told: Values
    sources: list[dict[str, str]]


def gather(run: Path, rows: Iterable[Row]) -> Report:
    """rows: of this folder. Raises ValueError for a run.json that is none."""
    rows = list(latest(rows).values())
    lines, groups = table(rows), defaultdict(list)
    for row in rows:
        if row.error is None:
            groups[(row.model, row.task, row.length, row.question), row.recipe].append(row)
    cells = list(dict.fromkeys(map(_cell, lines)))
    points = [_point(line, cells.index(_cell(line)), groups[_cell(line), line.recipe]) for line in lines]
    fronts = [{f"{q}/{c}": _front(points, cell, q, c) for q in QUALITIES for c in COSTS} for cell in range(len(cells))]
    sources = list({json.dumps(r.versions, sort_keys=True): r.versions for r in rows if r.versions}.values())
    return Report(run.resolve().name, cells, points, fronts, _spots(rows, cells), _failures(rows), _told(run), sources)


def cost(point: Values, which: str) -> float | None:
    """MB (10^6 bytes) or milliseconds."""
    if which == "decode":
        return point["decode_ms_per_token"]
    held = point["device_bytes" if which == "device" else "total_bytes"]
    return held / 1e6 if held else None


def _cell(line: Line) -> Cell:
    return line.model, line.task, line.length, line.question


def _point(line: Line, cell: int, rows: list[Row]) -> Values:
    held = None if line.device_bytes is None else line.device_bytes + (line.host_bytes or 0)
    answered = [row for row in rows if row.nll is not None and row.answer_tokens]
    nll = interval([row.nll or 0.0 for row in answered], [row.answer_tokens or 0 for row in answered])
    kl = interval([row.kl for row in rows if row.kl is not None])
    told: Values = {"cell": cell, "total_bytes": held}
    for name, bounds in (("nll", nll), ("kl", kl)):
        told[f"{name}_low"], told[f"{name}_high"] = bounds or (None, None)
    return {name: None if _odd(value) else value for name, value in (asdict(line) | told).items()}


def _odd(value: Any) -> bool:
    """No number that can be compared or drawn."""
    return isinstance(value, float) and not math.isfinite(value)


def _front(points: list[Values], cell: int, quality: str, which: str) -> list[list[int]]:
    some = [
        (i, x, QUALITIES[quality] * p[quality])
        for i, p in enumerate(points)
        if p["cell"] == cell and p[quality] is not None and (x := cost(p, which)) is not None
    ]
    at: dict[tuple[float, float], list[int]] = defaultdict(list)
    for k in front([(x, y) for _, x, y in some]):
        at[some[k][1:]].append(some[k][0])
    return [sorted(at[place]) for place in sorted(at)]


def _spots(rows: Iterable[Row], cells: list[Cell]) -> list[Values]:
    """Where a task hides something at a depth: the mean at each."""
    found: dict[tuple[int, str, float], list[Row]] = defaultdict(list)
    for row in rows:
        if row.depth is not None and row.error is None:
            found[cells.index((row.model, row.task, row.length, row.question)), row.recipe, row.depth].append(row)
    return [dict(zip(("cell", "recipe", "depth"), key, strict=True)) | _mean(some) for key, some in found.items()]


def _mean(rows: list[Row]) -> Values:
    scores = [row.score for row in rows if row.score is not None]
    told = {"n": len(rows), "score": mean(scores) if scores else None, "nll": nll_of(rows)}
    return {name: None if _odd(value) else value for name, value in told.items()}


def _failures(rows: Iterable[Row]) -> list[Values]:
    count = Counter((row.recipe, row.task, row.length, row.question, row.error) for row in rows if row.error)
    names = ("recipe", "task", "length", "question", "error")
    return [dict(zip(names, key, strict=True)) | {"times": n} for key, n in count.items()]


def _told(run: Path) -> Values:
    file = run / "run.json"
    try:
        told = json.loads(file.read_text("utf-8")) if file.is_file() else {}
    except ValueError as error:
        raise ValueError(f"{file} is no run.json: {error}") from None
    if not isinstance(told, dict):
        raise ValueError(f"{file} is no run.json: an object was expected")
    return told
