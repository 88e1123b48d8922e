"""The table of ``mlx-engine info --memory``: what a model takes, and what of that fits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mlx_engine.generation.sizing import BATCHES, ModelSize, table


def facts(size: ModelSize, memory: int | None) -> dict[str, Any]:
    """Facts of memory for ``--json``, all in bytes and tokens."""
    longest = {_bits(bits): size.longest(bits, memory) for bits in size.footprints}
    rows = table(size, memory)
    return {"machine": memory, "weights": size.weights, "longest_context": longest, "rows": rows}


def lines(size: ModelSize, memory: int | None) -> list[str]:
    """Lines of text: what it takes, what there is, and the table."""
    known = "not known" if memory is None else _gigabytes(memory)
    told = [f"{'weights':<15} {_gigabytes(size.weights)}", f"{'memory':<15} {known}"]
    if memory is not None:
        for bits in size.footprints:
            longest = size.longest(bits, memory)
            fits = "any number of tokens" if longest is None else f"{longest} tokens"
            name = f"fits, {_bits(bits)}"
            told.append(f"{name:<15} {fits} of one request")
    rows = table(size, memory)
    head = ["context", "KV cache", *(f"{n} at once" for n in BATCHES)]
    body: list[list[str]] = []
    for bits in size.footprints:
        for context in size.contexts():
            found = {
                row["batch"]: _told(row)
                for row in rows
                if (row["context"], row["kv_bits"]) == (context, bits)
            }
            body.append([str(context), _bits(bits), *(found.get(n, "-") for n in BATCHES)])
    return [*told, "", *_aligned([head, *body]), "", *_notes(size, memory)]


def _notes(size: ModelSize, memory: int | None) -> list[str]:
    notes = ["Weights and KV caches together. A tenth of what the weights leave is for the rest."]
    if memory is not None:
        notes.append("* does not fit")
    if len(size.footprints) > 1:
        notes.append("- a quantised KV cache is for one request at a time")
    else:
        notes.append("This model's KV cache cannot be quantised.")
    return notes


def _told(row: dict[str, Any]) -> str:
    return _gigabytes(row["bytes"]) + ("*" if row["fits"] is False else "")


def _bits(bits: int | None) -> str:
    return "full" if bits is None else f"{bits} bits"


def _gigabytes(size: int) -> str:
    return f"{size / 1e9:,.2f} GB" if size >= 1e9 else f"{size / 1e6:,.1f} MB"


def _aligned(rows: list[list[str]]) -> list[str]:
    """Columns of equal width, all but the first two to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]

    def line(row: list[str]) -> str:
        pads: list[Callable[[str, int], str]] = [str.ljust, str.ljust]
        pads += [str.rjust] * (len(row) - 2)
        cells = (pad(cell, width) for pad, cell, width in zip(pads, row, widths, strict=True))
        return "  ".join(cells).rstrip()

    return [line(row) for row in rows]
