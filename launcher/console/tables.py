"""Tables of text, as wide as what is in them."""

from __future__ import annotations

from collections.abc import Sequence


def table(rows: Sequence[Sequence[str]], align: str = "") -> list[str]:
    """Return a line for each row, its cells padded to columns two spaces apart.

    Args:
        rows: The head among them, if there is one; all of one length.
        align: A letter for each column: `>` pads on the left, all others on the right.
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
