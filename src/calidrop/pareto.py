"""The front of what was measured, and its picture."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from calidrop.planning import Advice, Option

FLOOR = 1e-6  # nats: nearer than that is rounding noise, and a logarithm needs a bottom
INK, SMALL, MUTED, LINE, ACCENT, LIMIT = "#1a1a1a", "#5b6570", "#9aa3ad", "#e4e7eb", "#0b5fa5", "#b3261e"


def front(points: Sequence[tuple[float, float]]) -> set[int]:
    """Indices of the points that no other beats: smaller or equal in both and smaller in one. Of equals all stay."""
    beaten = {i for i, (x, y) in enumerate(points) if any(a <= x and b <= y and (a < x or b < y) for a, b in points)}
    return set(range(len(points))) - beaten


def check_drawing(path: str | Path) -> None:
    """Raises ValueError where `draw` cannot write such a file: matplotlib is missing or knows no such format."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError:
        raise ValueError("drawing needs matplotlib: pip install 'calidrop[plot]'") from None
    known = sorted(FigureCanvasAgg.get_supported_filetypes())
    if Path(path).suffix[1:].lower() not in known:
        raise ValueError(f"cannot draw {path}: expected a name that ends in .png (or {', '.join(known)})")


def draw(advice: Advice, path: str | Path) -> None:
    """KL against device bytes of every measured option, both logarithmic, the front marked and named, as a PNG, or
    what else the name of the file says. Needs matplotlib (the extra `plot`). Raises ValueError where nothing was
    measured, and as `check_drawing` does."""
    check_drawing(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    measured = [o for o in advice.options if o.row is not None]
    if not measured:
        raise ValueError("nothing was measured, so there is nothing to draw: KL needs --measure")
    figure = Figure(figsize=(12, 6.4), layout="constrained")  # no pyplot: no global state, no window
    FigureCanvasAgg(figure)
    axes, beside = figure.subplots(1, 2, width_ratios=(3.4, 1))
    _frame(axes, advice)
    _points(axes, measured)
    axes.margins(x=0.08, y=0.08)
    _limits(axes, advice, measured)
    best = sorted((o for o in measured if o.front), key=lambda o: o.device_bytes)
    _key(beside, best)
    _number(figure, axes, best, measured)
    figure.savefig(path, dpi=140)


def _at(o: Option) -> tuple[float, float]:
    assert o.row is not None
    return o.device_bytes / 1e6, max(o.row.kl, FLOOR)


def _frame(axes: Any, advice: Advice) -> None:
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlabel("cache on the device, MB (10⁶ bytes)", color=INK)
    axes.set_ylabel("KL to the uncompressed model, nats per token", color=INK)
    rows = f", batch {advice.batch}" if advice.batch > 1 else ""
    title = f"{advice.context} tokens of context{rows}; uncompressed {advice.full_bytes / 1e6:.4g} MB"
    axes.set_title(title, loc="left", color=INK, fontsize=12, weight="bold")
    axes.grid(True, which="major", color=LINE, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(LogLocator(subs=(1, 2, 3, 5, 7), numticks=20))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:.2g}" if x < 100 else f"{x:,.0f}"))
        axis.set_minor_formatter(NullFormatter())


def _points(axes: Any, options: list[Option]) -> None:
    best = sorted(_at(o) for o in options if o.front)
    axes.step(*zip(*best, strict=True), where="post", color=ACCENT, linewidth=1.5, zorder=2)
    for host, marker, label in ((False, "o", "device only"), (True, "D", "evicted tokens kept on the host")):
        for on_front, color, size in ((False, MUTED, 26), (True, ACCENT, 52)):
            some = [_at(o) for o in options if o.front == on_front and (o.host_bytes > 0) == host]
            if some:
                x, y = zip(*some, strict=True)
                name = label + (", on the front" if on_front else "")
                axes.scatter(x, y, s=size, marker=marker, color=color, edgecolor="white", linewidth=0.8,
                             zorder=4 if on_front else 3, label=name)  # fmt: skip


def _limits(axes: Any, advice: Advice, options: list[Option]) -> None:
    """A line at the memory there is, where it is near enough to be worth the room."""
    if advice.memory < 2 * max(o.device_bytes for o in options):
        axes.axvline(advice.memory / 1e6, color=LIMIT, linewidth=1, linestyle=(0, (4, 3)), zorder=1, label="memory")
    axes.figure.legend(frameon=False, fontsize=8.5, labelcolor=INK, loc="outside lower center", ncols=5)


def _key(axes: Any, best: list[Option]) -> None:
    """What the numbers at the front mean: names would not fit there."""
    axes.axis("off")
    axes.text(0, 1, "the front", transform=axes.transAxes, va="top", color=INK, fontsize=9.5, weight="bold")
    step = min(0.062, 0.93 / max(1, len(best)))
    for i, o in enumerate(best):
        y = 0.94 - i * step
        axes.text(0, y, str(i + 1), transform=axes.transAxes, va="top", color=ACCENT, fontsize=8, weight="bold")
        axes.text(0.09, y, o.recipe, transform=axes.transAxes, va="top", color=INK, fontsize=8)
        told = f"{_at(o)[0]:.3g} MB, KL {o.row.kl if o.row else 0:.2g}"
        axes.text(0.09, y - 0.45 * step, told, transform=axes.transAxes, va="top", color=SMALL, fontsize=7)


def _number(figure: Any, axes: Any, best: list[Option], options: list[Option]) -> None:
    """Writes the number of every point of the front beside it, where it covers no point, no line and no number."""
    figure.canvas.draw()  # fixes the layout, so that pixels mean something
    renderer = figure.canvas.get_renderer()
    taken = [axes.transData.transform(_at(o)) for o in options]
    ends = [axes.transData.transform(_at(o)) for o in best]
    for (x0, y0), (x1, y1) in pairwise(ends):  # the steps between them
        taken += [(x0 + (x1 - x0) * i / 99, y0) for i in range(100)]
        taken += [(x1, y0 + (y1 - y0) * i / 99) for i in range(100)]
    boxes: list[Any] = []
    for i, o in enumerate(best):
        for dx, dy in _PLACES:
            text = axes.annotate(
                str(i + 1), _at(o), (dx, dy), textcoords="offset points", ha="center", va="center", fontsize=8,
                color=ACCENT, weight="bold", zorder=5,
            )  # fmt: skip
            box = text.get_window_extent(renderer).padded(3)
            if not any(box.overlaps(other) for other in boxes) and not any(box.contains(*p) for p in taken):
                boxes.append(box)
                break
            text.remove()


# Offsets in points; below and left of the front is nothing else.
_PLACES = tuple(
    (x * far, y * far)
    for far in (9, 13, 18, 24)
    for x, y in ((-0.8, -0.8), (-1, 0), (0, -1), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8), (1, 0), (0, 1))
)
