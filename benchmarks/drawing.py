"""The one style of all pictures: to be read at 800 pixels, on a light page, by everybody.

The colours are those of Okabe and Ito, which people with any kind of colour vision can tell apart,
and what they tell is told by a marker, a line or a word as well.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal

from benchmarks.spread import Spread

BLUE, ORANGE, GREEN, RED = "#0072B2", "#E69F00", "#009E73", "#D55E00"
PURPLE, SKY, BLACK, GREY = "#CC79A7", "#56B4E9", "#222222", "#8A8A8A"
SERIES = (BLUE, ORANGE, GREEN, RED, PURPLE, SKY, BLACK, GREY)
MARKERS = "os^Dvx+*"

_WIDTH = 8.0  # inches, of 100 pixels at 800 pixels
_DOTS = 180  # an inch: sharp on a screen of twice the density, too
_STYLE = {
    "figure.facecolor": "white",
    "axes.facecolor": "white",
    "savefig.facecolor": "white",
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.labelsize": 9.5,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.8,
    "legend.fontsize": 8.5,
    "legend.frameon": False,
    "legend.handlelength": 3.2,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}


def new_figure(rows: int, columns: int, height: float) -> tuple[Any, list[Any]] | None:
    """A figure of ``height`` inches, and its axes row by row; ``None`` without matplotlib."""
    try:
        matplotlib = import_module("matplotlib")
    except ModuleNotFoundError:
        return None
    matplotlib.use("Agg")
    matplotlib.rcParams.update(_STYLE)
    figure, axes = import_module("matplotlib.pyplot").subplots(
        rows, columns, figsize=(_WIDTH, height), layout="constrained", squeeze=False
    )
    return figure, list(axes.flat)


def save_picture(figure: Any, path: Path) -> None:
    """As a small PNG; nothing happens without a figure."""
    if figure is None:
        return
    raw = io.BytesIO()
    figure.savefig(raw, format="png", dpi=_DOTS)
    import_module("matplotlib.pyplot").close(figure)
    # 64 colours are enough for lines, dots and their soft edges, and a third of the bytes.
    image = import_module("PIL.Image").open(raw).convert("RGB")
    image.quantize(64, dither=0).save(path, optimize=True)


def draw_dots(axis: Any, rows: Mapping[str, Spread], label: str, scale: float = 1.0) -> None:
    """One line a row: a dot for each value, a bar at the median."""
    for place, spread in enumerate(rows.values()):
        values = [value * scale for value in spread.values]
        axis.plot(values, [place] * len(values), "o", alpha=0.45, color=BLUE)
        axis.plot([spread.median * scale], [place], "|", color=BLACK, markersize=16)
    axis.set_yticks(range(len(rows)), list(rows))
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.set_xlabel(label)
    axis.grid(visible=False, axis="y")


def draw_line(
    axis: Any,
    places: Sequence[float],
    spreads: Sequence[Spread],
    label: str,
    *,
    series: int,
    style: str = "-",
    scale: float = 1.0,
) -> None:
    """Medians as a line with markers, and the range from the least to the most around it."""
    colour, marker = SERIES[series], MARKERS[series]
    middle = [spread.median * scale for spread in spreads]
    low = [min(spread.values) * scale for spread in spreads]
    high = [max(spread.values) * scale for spread in spreads]
    axis.plot(places, middle, marker + style, color=colour, label=label)
    axis.fill_between(places, low, high, color=colour, alpha=0.13, linewidth=0)


def ticks_at(axis: Any, places: Sequence[int], label: str) -> None:
    """A horizontal axis in powers of two, with a tick at each place."""
    axis.set_xscale("log", base=2)
    axis.set_xticks(places, [f"{place:,}" for place in places])
    axis.set_xticks([], minor=True)
    axis.set_xlabel(label)


def log_scale(axis: Any, way: Literal["x", "y"]) -> None:
    """A logarithmic axis with plain numbers at 1, 2, 5, 10, ..."""
    ticker = import_module("matplotlib.ticker")
    axis.set(**{f"{way}scale": "log"})
    line = axis.xaxis if way == "x" else axis.yaxis
    line.set_major_locator(ticker.LogLocator(subs=(1, 2, 5)))
    line.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:,g}"))
    line.set_minor_locator(ticker.NullLocator())


def legend_below(figure: Any, axis: Any) -> None:
    """One legend for all axes, in a line under them."""
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
