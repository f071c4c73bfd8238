"""The charts of a report as PNGs, for a README."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import altair as alt
import vl_convert
from PIL import Image

from calidrop.eval.table import Cell
from calidrop.report import charts
from calidrop.report.families import family
from calidrop.report.gather import QUALITIES, Report, Values, cost

WIDTH, MOST = 430, 40  # pixels of a chart; recipes of a heatmap before only the best are drawn


def pictures(report: Report, folder: Path) -> list[Path]:
    """Fronts of each cell by each quality, and where a task hides something, a heatmap."""
    folder.mkdir(exist_ok=True)
    made = []
    for name, chart in [*_fronts(report), *_heats(report)]:
        path = folder / f"{name}.png"
        image = Image.open(io.BytesIO(vl_convert.vegalite_to_png(charts.spec(chart), scale=2)))
        image.convert("RGB").save(path, optimize=True)  # a third of the bytes
        made.append(path)
    return made


def _fronts(report: Report) -> Iterator[tuple[str, Any]]:
    for index, cell in enumerate(report.cells):
        for quality in QUALITIES:
            if told := [
                c for c in ("device", "decode") if report.fronts[index][f"{quality}/{c}"]
            ]:  # none where not timed
                drawn = alt.hconcat(*(_front(report, index, quality, c) for c in told), spacing=40)
                how = "A diamond also holds bytes on the host. Bars: 95 % bootstrap intervals, of the front."
                exact = "" if quality == "score" else " What is exact (0) lies at the bottom."
                title = alt.Title(f"{_told(report, cell)}: {charts.QUALITY[quality]}", subtitle=how + exact)
                yield f"front-{_file(report, cell)}-{quality}", drawn.properties(title=title)


def _front(report: Report, cell: int, quality: str, which: str) -> Any:
    front = report.fronts[cell][f"{quality}/{which}"]
    ranks = {i: n for n, equal in enumerate(front, 1) for i in equal}
    points = [
        {**p, "family": family(p["recipe"]), "rank": ranks.get(i, 0), "shown": True}
        for i, p in enumerate(report.points)
        if p["cell"] == cell
    ]
    best = sorted((p for p in points if p["rank"]), key=lambda p: p["rank"])
    return alt.vconcat(charts.pareto(quality, which, points, WIDTH, which == "device"), _key(best, quality, which))


def _key(best: list[Values], quality: str, which: str) -> Any:
    """What the numbers at the front mean."""
    unit = "ms" if which == "decode" else "MB"
    lines = [
        {"line": i, "rank": p["rank"], "recipe": p["recipe"], "told": f"{p[quality]:.3g}, {cost(p, which):.3g} {unit}"}
        for i, p in enumerate(best)
    ]
    base = alt.Chart(alt.Data(values=lines), width=WIDTH, height=alt.Step(16)).encode(alt.Y("line:O", axis=None))
    left = {"align": "left", "fontSize": 11}
    return alt.layer(
        base.mark_text(**left, fontWeight="bold", color=charts.ink("accent"), x=0).encode(text="rank:O"),
        base.mark_text(**left, color=charts.ink("ink"), x=22, limit=WIDTH - 125).encode(text="recipe:N"),
        base.mark_text(fontSize=11, align="right", color=charts.ink("soft"), x=WIDTH).encode(text="told:N"),
    )


def _heats(report: Report) -> Iterator[tuple[str, Any]]:
    kinds = dict.fromkeys(_kind(report.cells[spot["cell"]]) for spot in report.spots)
    for model, task, question in kinds:
        spots = [
            {**spot, "length": report.cells[spot["cell"]][2]}
            for spot in report.spots
            if _kind(report.cells[spot["cell"]]) == (model, task, question)
        ]
        cell = (model, task, 0, question)
        recipes = dict.fromkeys(spot["recipe"] for spot in spots)
        title = _told(report, cell)
        if len(recipes) > MOST:
            best = _best(report, {spot["cell"] for spot in spots})
            title += f": the {len(best)} of {len(recipes)} recipes on a front"
            spots = [spot for spot in spots if spot["recipe"] in best]
        for quality in ("score", "nll"):
            if any(spot[quality] is not None for spot in spots):
                yield f"heat-{_file(report, cell)}-{quality}", charts.heat(quality, spots).properties(title=title)


def _best(report: Report, cells: set[int]) -> set[str]:
    """On a front of any quality against the memory they hold, in one of these cells."""
    found = {i for c in cells for q in QUALITIES for equal in report.fronts[c][f"{q}/device"] for i in equal}
    return {report.points[i]["recipe"] for i in found}


def _kind(cell: Cell) -> tuple[str, str, str | None]:
    return cell[0], cell[1], cell[3]


def _told(report: Report, cell: Cell) -> str:
    model, task, length, question = cell
    told = [model, task, f"{length} tokens" if length else "", f"question {question}" if question else ""]
    return ", ".join(word for word in told if word)


def _file(report: Report, cell: Cell) -> str:
    model, task, length, question = cell
    several = len({c[0] for c in report.cells}) > 1
    words = [model if several else "", task, str(length or ""), question or ""]
    return re.sub(r"[^\w.-]+", "_", "-".join(word for word in words if word))
