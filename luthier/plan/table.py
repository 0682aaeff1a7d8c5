"""Sizes and columns as people read them."""

from __future__ import annotations

from collections.abc import Sequence

GIB = 2.0**30


def gib(size: float) -> str:
    """Bytes as people read them."""
    if size == 0:
        return "0"
    return f"{size / GIB:,.2f} GiB" if size >= GIB / 10 else f"{size / 2**20:,.2f} MiB"


def table(rows: Sequence[Sequence[str]], numbers: Sequence[int]) -> list[str]:
    """Columns of one width each, those in `numbers` to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  "
        + "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
