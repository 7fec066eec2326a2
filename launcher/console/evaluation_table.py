"""The text of an evaluation: which weights, and each metric on a line."""

from __future__ import annotations

from launcher.console.tables import table
from launcher.printable import printable_line
from launcher.runs.evaluation_result import EvaluationResult


def evaluation_text(evaluation: EvaluationResult) -> str:
    """Return an evaluation as text."""
    ranks = f"{evaluation.ranks:,} rank{'s' * (evaluation.ranks > 1)}"
    head = (
        f"{evaluation.run_dir.shown}: {evaluation.weights} after step {evaluation.step:,}, {ranks}"
    )
    rows = [[printable_line(name), f"{value:.6g}"] for name, value in evaluation.metrics.items()]
    return "\n".join([head, *(f"  {line}" for line in table(rows, "<>"))])
