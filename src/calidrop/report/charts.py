"""The charts, in Altair, of data as `gather` has it: for the page, which brings its data, and for pictures. Colours are
parameters, so that a page can change them; those given here are for pictures."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import altair as alt

from calidrop.pareto import FLOOR
from calidrop.report.families import FAMILIES

LIGHT = {"ink": "#1a1d21", "soft": "#59636e", "line": "#dfe3e8", "ground": "#ffffff", "accent": "#0b5fa5"}
"""As in pages/base.css."""
COLOURS = dict(zip(FAMILIES, ("#7d8791", "#2a7fd4", "#d1701f", "#8a63d2", "#17996b", "#c8457f"), strict=True))
"""Readable on light and on dark."""
FONT = "system-ui, 'Segoe UI', Roboto, Helvetica, Arial, 'DejaVu Sans', sans-serif"
QUALITY = {
    "score": "score (higher is better)",
    "nll": "nll of the right answer, nats per token (lower is better)",
    "kl": "KL to the uncompressed cache, nats (lower is better)",
}
COST = {
    "device": ("MB on the device", "datum.device_bytes / 1e6"),
    "total": ("MB on device and host", "datum.total_bytes / 1e6"),
    "decode": ("ms per token", "datum.decode_ms_per_token"),
}
FAMILY = alt.Color("family:N", scale=alt.Scale(domain=list(COLOURS), range=list(COLOURS.values())))
PICKED = "datum.recipe === picked"

Data = Sequence[dict[str, Any]]


def ink(name: str) -> Any:
    return alt.expr(name)


def pareto(quality: str, cost: str, points: Data = (), width: Any = "container", legend: bool = False) -> Any:
    """points: those of one cell, with `rank` (on the front, cheapest first, from 1; else 0) and `shown` (not filtered
    out). The recipe that is the parameter `picked` stands out. Logarithms need a bottom: what is exact lies on it."""
    log = quality != "score"
    chart = alt.Chart()
    x = alt.X("x:Q", title=COST[cost][0], scale=alt.Scale(type="log", nice=False, padding=22), axis=_axis(True))
    scale = alt.Scale(type="log", nice=False, padding=16) if log else alt.Scale(zero=False, nice=False, padding=16)
    y = alt.Y("y:Q", title=None, scale=scale, axis=_axis(log))
    colour = FAMILY.legend(orient="top", title=None, columns=3) if legend else FAMILY.legend(None)
    shape = alt.Shape("host:N", scale=alt.Scale(domain=[False, True], range=["circle", "diamond"]), legend=None)
    out = f"datum.rank > 0 || {PICKED}"
    size, opacity = (alt.condition(out, alt.value(a), alt.value(b)) for a, b in ((100, 46), (1, 0.6)))
    edge = alt.condition(out, alt.value(ink("ground")), alt.value(None))
    tips = [alt.Tooltip(f"{name}:N") for name in ("title", *TIPS)]
    ring = alt.condition(PICKED, alt.value(1), alt.value(0))
    steps = chart.transform_filter("datum.rank > 0").mark_line(interpolate="step-after", strokeWidth=1.5)
    layers = alt.layer(
        steps.encode(x, y, order="rank:Q", color=alt.value(ink("accent"))),
        chart.mark_rule(opacity=0.6).encode(x, alt.Y("low:Q", title=None, scale=scale), alt.Y2("high:Q"), colour),
        chart.mark_point(size=280, strokeWidth=2, color=ink("ink")).encode(x, y, opacity=ring),
        chart.transform_filter("datum.shown").mark_point(filled=True, strokeWidth=1)
        .encode(x, y, colour, shape, tooltip=tips, size=size, opacity=opacity, stroke=edge),
        chart.mark_text(dx=-8, dy=10 if log else -10, fontSize=11, fontWeight="bold", color=ink("accent"))
        .encode(x, y, text="label:N"),
        data=alt.Data(values=list(points)),
    )  # fmt: skip
    return _values(layers, quality, cost).properties(width=width, height=340)


def _axis(log: bool) -> alt.Axis:
    return alt.Axis(format="~g", tickCount=5 if log else 6, labelFlush=False)


def _interval(low: str, high: str, form: str) -> str:
    return f"(isValid({low}) ? ' [' + format({low}, '{form}') + ', ' + format({high}, '{form}') + ']' : '')"


def _if(value: str, then: str) -> str:
    return f"isValid({value}) ? {then} : '–'"


def _megabytes(value: str) -> str:
    return _if(value, f"format({value} / 1e6, '.4~g') + ' MB'")


TIPS = {
    "kind": "datum.family",
    "score ": _if("datum.score", "format(datum.score, '.3f') + " + _interval("datum.low_", "datum.high_", ".2f")),
    "nll ": _if("datum.nll", "format(datum.nll, '.3f') + " + _interval("datum.nll_low", "datum.nll_high", ".3f")),
    "KL": _if("datum.kl", "format(datum.kl, '.2~g') + " + _interval("datum.kl_low", "datum.kl_high", ".2~g")),
    "device": _megabytes("datum.device_bytes"),
    "on host": _megabytes("datum.host_bytes"),
    "decode": _if("datum.decode_ms_per_token", "format(datum.decode_ms_per_token, '.1f') + ' ms per token'"),
    "N": "datum.n + (datum.errors ? ', ' + datum.errors + ' failed' : '')",
}
"""What is said of a point on hover: vega-tooltip makes `title` the heading."""


def _values(chart: Any, quality: str, cost: str) -> Any:
    low, high = ("low", "high") if quality == "score" else (f"{quality}_low", f"{quality}_high")
    near = {"y": f"datum.{quality}", "at": f"datum.{low}", "to": f"datum.{high}"}
    barred = f"isValid(datum.at) && datum.shown && (datum.rank > 0 || {PICKED})"  # a layer without data has no extent
    if quality != "score":
        near = {name: f"isValid({value}) ? max({value}, datum.least / 2) : null" for name, value in near.items()}
    return (
        chart.transform_filter(f"isValid(datum.{quality}) && {COST[cost][1]} > 0")
        .transform_calculate(above=f"datum.{quality} > {FLOOR} ? datum.{quality} : null")
        .transform_joinaggregate(least="min(above)")
        .transform_calculate(least=f"datum.least || {2 * FLOOR}", title="datum.recipe", low_="datum.low",
                             high_="datum.high", x=COST[cost][1], host="datum.host_bytes > 0",
                             label="datum.rank > 0 && datum.shown ? datum.rank : ''", **TIPS)
        .transform_calculate(**near)
        .transform_calculate(low=f"{barred} ? datum.at : datum.y", high=f"{barred} ? datum.to : datum.y")
    )  # fmt: skip


def heat(quality: str, spots: Data = ()) -> Any:
    """A row for each recipe, best first, a block for each length, a cell for each depth."""
    better = quality == "score"
    scale = alt.Scale(scheme="viridis", domain=[0, 1]) if better else alt.Scale(scheme="viridis", reverse=True)
    title = QUALITY[quality]
    value = alt.Color(f"{quality}:Q", scale=scale, legend=alt.Legend(title=title, orient="top", gradientLength=180))
    best = alt.EncodingSortField(quality, "mean", "descending" if better else "ascending")
    depths = alt.Axis(orient="top", format="~%", labelAngle=0, labelOverlap=False, labelFontSize=9)
    told = [alt.Tooltip(f"{name}:N") for name in ("title", "prompt", "depth of it", "score ", "nll ", "N")]
    words = {
        "title": "datum.recipe", "prompt": "datum.length + ' tokens'", "depth of it": "format(datum.depth, '.0%')",
        "score ": _if("datum.score", "format(datum.score, '.2f')"), "N": "datum.n",
        "nll ": _if("datum.nll", "format(datum.nll, '.3f')"),
    }  # fmt: skip
    return (
        alt.Chart(alt.Data(values=list(spots)), width=alt.Step(28), height=alt.Step(19))
        .transform_filter(f"isValid(datum.{quality})")
        .transform_calculate(**words)
        .mark_rect(stroke=ink("ground"), strokeWidth=1)
        .encode(
            alt.X("depth:O", title=None, axis=depths),
            alt.Y("recipe:N", title=None, sort=best, axis=alt.Axis(labelFontSize=11, labelLimit=ink("names"))),
            value,
            alt.Column("length:O", title=None, header=alt.Header(labelExpr="datum.value + ' tokens'"), spacing=12),
            tooltip=told,
        )
    )


def spec(chart: Any) -> dict[str, Any]:
    """Vega-Lite, with what can be set later as parameters."""
    line, soft = ink("line"), ink("soft")
    words = {"labelColor": soft, "titleColor": soft, "titleFontWeight": "normal"}
    axis = {"gridColor": line, "domainColor": line, "tickColor": line, "titleFontSize": 12, "labelFontSize": 11}
    told = (
        chart.configure(font=FONT, background=ink("ground"))
        .configure_view(stroke=None)
        .configure_axis(**words, **axis)
        .configure_header(**words, labelFontSize=12)
        .configure_legend(**words, labelLimit=400, titleLimit=400, gradientThickness=10)
        .configure_title(color=ink("ink"), subtitleColor=soft, anchor="start", fontSize=13, subtitleFontSize=11)
        .to_dict()
    )
    params = {**LIGHT, "picked": "", "names": 420}
    return told | {"params": [{"name": name, "value": value} for name, value in params.items()]}
