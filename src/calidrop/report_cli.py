"""`calidrop report`: a run of `calidrop eval`, to look at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from calidrop.terminal import check_writable, need, stdout


def report(
    run: Annotated[Path, typer.Argument(help="The folder that `calidrop eval --out` wrote.")],
    out: Annotated[Path | None, typer.Option("--out", "-o", help="The page; default: RUN/report.html.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw fronts and heatmaps as PNGs into this folder too.")] = None,
) -> None:
    """Show a run: Pareto fronts, heatmaps and the table as one page that needs no network."""
    need("altair", "vl_convert", "PIL", extra="report")
    from calidrop.eval.folder import rows_of

    rows = rows_of(run)
    page = out or run / "report.html"
    check_writable(page)
    if png is not None:
        check_writable(png / "front.png" if png.is_dir() else png)
        if png.exists() and not png.is_dir():
            raise ValueError(f"cannot write PNGs into {png}: no folder")
    with Console(stderr=True).status("Drawing"):
        from calidrop.report.gather import gather
        from calidrop.report.page import page as render

        told = gather(run, rows)
        page.write_text(render(told), "utf-8")
        if png is not None:
            from calidrop.report.pictures import pictures

            drawn = pictures(told, png)
    recipes = len({p["recipe"] for p in told.points})
    size = page.stat().st_size / 1e6
    stdout().print(f"{page}: {recipes} recipes, {len(told.cells)} tables, {size:.1f} MB", soft_wrap=True)
    if png is not None:
        stdout().print(f"{len(drawn)} pictures in {png}", soft_wrap=True)
