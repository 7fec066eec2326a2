"""Tables of plain text in aligned columns."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str = "") -> list[str]:
    """Return one line for each row, with columns padded to equal width and two spaces between.

    Args:
        rows: Rows of equal length, at least one. A header is a row like any other.
        align: One character for each column: `>` aligns it to the right, anything else to the
            left. Columns beyond the end of `align` are aligned to the left.
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    sides = align.ljust(len(widths), "<")
    return [
        "  ".join(
            cell.rjust(width) if side == ">" else cell.ljust(width)
            for cell, width, side in zip(row, widths, sides, strict=False)
        ).rstrip()
        for row in rows
    ]
