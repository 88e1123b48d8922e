"""The picture of ``benchmarks.timeline``: three lanes for each way, from one cancellation each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from benchmarks.drawing import BLACK, BLUE, ORANGE, RED, new_figure
from benchmarks.spread import Record

WAYS = {  # and what they are called in the picture
    "published fix": "asyncio.Lock, shield, then await in except CancelledError",
    "run_blocking": "mlx_engine, the same function in engine.run_blocking",
    "generate": "mlx_engine, a long prompt in engine.generate",
}
LOOP, LOCK, THREAD, TOP = 4.0, 2.4, 0.8, 4.9  # the lanes, and what is said above them
APART = 0.3  # two bars in one lane


def draw(record: Record) -> Any:
    made = new_figure(len(WAYS), 1, 6.6)
    if made is None:
        return None
    figure, axes = made
    shown = {name: record["ways"][name]["shown"] for name in WAYS}
    end = max(max(trace["second_told"], trace["second"][2]) for trace in shown.values())
    for axis, (name, trace) in zip(axes, shown.items(), strict=True):
        draw_trace(axis, trace, "two threads" if name == "published fix" else "MLX thread")
        axis.set_title(WAYS[name])
        axis.set_xlim(-2, end * 1e3 * 1.02)
    axes[-1].set_xlabel("ms since the first caller has asked")
    return figure


def draw_trace(axis: Any, trace: Record, threads: str) -> None:
    """Who waits in the event loop, who has the lock, who is in the thread."""
    first, second = trace["first"], trace["second"]
    draw_bar(axis, LOOP + APART, (0, trace["first_told"]), "first caller waits", BLUE, 0.5)
    waits = trace["second_asks"], trace["second_told"]
    draw_bar(axis, LOOP - APART, waits, "", ORANGE, 0.5)
    *of_first, of_second = trace["lock"]
    for span in of_first:
        draw_bar(axis, LOCK, span, "first has it", BLUE)
    draw_bar(axis, LOCK, of_second, "second has it", ORANGE)
    cancel = trace["cancel"] * 1e3
    axis.text(cancel + 1, LOOP - APART, "second caller waits", fontsize=8, va="center")
    axis.axvline(cancel, color=BLACK, linestyle="--", linewidth=1.2)
    axis.text(cancel - 1, TOP, "scope cancelled", ha="right", va="bottom")
    if second[0] < first[1]:
        draw_overlap(axis, first, second)
    else:
        draw_bar(axis, THREAD, first, "first in MLX", BLUE)
        draw_bar(axis, THREAD, second[1:], "second in MLX", ORANGE)
    axis.set_yticks((LOOP, LOCK, THREAD), ("event loop", "generation lock", threads))
    axis.tick_params(axis="y", length=0)
    axis.set_ylim(0, TOP + 0.8)
    axis.grid(visible=False, axis="y")


def draw_overlap(axis: Any, first: Sequence[float], second: Sequence[float]) -> None:
    """Two threads, and for how long both are inside."""
    entered, left = second[0] * 1e3, first[1] * 1e3
    axis.axvspan(entered, left, color=RED, alpha=0.16, linewidth=0)
    said = f"both inside: {left - entered:.0f} ms"
    axis.text(entered + 1, TOP, said, color=RED, va="bottom", weight="bold")
    draw_bar(axis, THREAD + APART, first, "first in MLX", BLUE, 0.5)
    draw_bar(axis, THREAD - APART, second[1:], "second in MLX", ORANGE, 0.5)
    held_back = (second[1] - second[0]) * 1e3
    lane, style = THREAD - APART, {"facecolor": "white", "edgecolor": ORANGE, "hatch": "////"}
    axis.barh(lane, held_back, 0.5, left=entered, **style)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.2}
    axis.text(entered + 2, lane, "second, kept from MLX", fontsize=8, va="center", bbox=box)


def draw_bar(
    axis: Any, lane: float, span: Sequence[float], said: str, colour: str, height: float = 0.8
) -> None:
    """With its name inside, or behind it where it is too short."""
    left, width = span[0] * 1e3, (span[1] - span[0]) * 1e3
    axis.barh(lane, width, height, left=left, color=colour, alpha=0.75)
    axis.text(left + (1 if width > 25 else width + 1), lane, said, fontsize=8, va="center")
