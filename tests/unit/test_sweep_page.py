"""The table and the page of a sweep."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from launcher.recipe.metric_goal import MetricGoal
from launcher.report.figures import ParallelAxis, ParallelCoordinates, as_rows, describe, to_json
from launcher.report.page import render
from launcher.report.sweep_page import sweep_page
from launcher.runs.rundir import RunDir
from launcher.sweeps.sweep_result import SweepResult, TrialResult
from launcher.sweeps.sweep_table import sweep_lines


def trial(index: int, state: Any, step: int, **changes: Any) -> TrialResult:
    """Return the result of a run with lr = 10 ** -index."""
    values = {
        "index": index,
        "settings": {"lr": 10.0**-index, "schedule": "cosine()" if index % 2 else "linear()"},
        "run_dir": RunDir(Path(f"/nowhere/{index}")),
        "state": state,
        "step": step,
        "metrics": {"accuracy": 0.1 * index, "loss": 1.0},
        "value": 0.1 * index,
    }
    return TrialResult(**{**values, **changes})


RESULT = SweepResult(
    path=Path("/nowhere"),
    goal=MetricGoal(name="accuracy", mode="max"),
    trials=(
        trial(0, "failed", 3, error="rank 0: ValueError: <no>\nand more"),
        trial(1, "finished", 20),
        trial(2, "dropped", 4),
        trial(3, "finished", 20),
        trial(4, "dropped", 8),
        trial(5, "finished", 20, metrics={"accuracy": math.nan, "loss": 1.0}, value=math.nan),
    ),
)


def test_runs_are_ranked() -> None:
    """Finished runs come first, by the metric; of dropped ones, the one that was dropped last."""
    assert [result.index for result in RESULT.ranked] == [3, 1, 5, 4, 2, 0]
    assert RESULT.best is RESULT[3]
    assert (RESULT.finished, RESULT.exit_code, len(RESULT)) == (False, 1, 6)
    lines = sweep_lines(RESULT)
    assert lines[0].split() == [
        "run",
        "lr",
        "schedule",
        "state",
        "steps",
        "accuracy",
        "loss",
        "error",
    ]
    assert lines[1].split() == ["3", "0.001", "cosine()", "finished", "20", "0.3000", "1.0000"]
    assert lines[-1].endswith("rank 0: ValueError: <no>")


@pytest.mark.parametrize(
    ("states", "code"),
    [
        (["finished", "dropped"], 0),
        (["finished", "failed"], 1),
        (["failed", "stopped"], 75),
        (["finished", "waiting"], 75),
    ],
)
def test_the_exit_code_tells_of_every_run(states: list[str], code: int) -> None:
    """A run that can be resumed weighs more than one that failed."""
    trials = tuple(trial(index, state, 1) for index, state in enumerate(states))
    result = SweepResult(path=RESULT.path, goal=RESULT.goal, trials=trials)
    assert result.exit_code == code


def test_a_sweep_without_a_metric_has_no_best_run() -> None:
    """A run whose metric is NaN is not the best one."""
    result = SweepResult(path=RESULT.path, goal=RESULT.goal, trials=RESULT.trials[5:])
    assert result.best is None


def test_parallel_coordinates_place_values() -> None:
    """Numbers that span decades are placed by their logarithms, text by its first appearance."""
    figure = ParallelCoordinates(
        title="runs",
        axes=[
            ParallelAxis(name="lr", values=[0.001, 0.1, 0.01]),
            ParallelAxis(name="schedule", values=["b", "a", "b"]),
            ParallelAxis(name="width", values=[4, 4, 4]),
            ParallelAxis(name="accuracy", values=[0.5, 0.75, 1.0]),
        ],
        names=["run 0", "run 1", "run 2"],
        largest_is_best=True,
    )
    drawn = json.loads(to_json(figure))
    assert [curve["type"] for curve in drawn["data"]] == ["scatter"] * 3
    assert drawn["data"][0]["y"] == pytest.approx([0, 0, 0.5, 0])
    assert drawn["data"][1]["y"] == pytest.approx([1, 1, 0.5, 0.5])
    assert drawn["data"][2]["y"] == pytest.approx([0.5, 0, 0.5, 1])
    colours = [curve["line"]["color"] for curve in drawn["data"]]
    assert colours[0] == colours[1] != colours[2]
    assert as_rows(figure)[1] == ["run 0", "0.001", "b", "4", "0.5"]
    assert "run 2: lr 0.01, schedule b, width 4, accuracy 1" in describe(figure)


def test_close_values_have_one_text() -> None:
    """Of values that would overlap, the largest is written; of many, the ends alone."""
    close = ParallelAxis(name="loss", values=[0.0, 0.99, 1.0])
    many = ParallelAxis(name="seed", values=[1.0, 1.5, 2.0])
    figure = ParallelCoordinates(title="runs", axes=[close, many], names=["a", "b", "c"])
    notes = json.loads(to_json(figure))["layout"]["annotations"]
    assert [note["text"] for note in notes if note["x"] == 0] == ["1", "0"]
    assert [note["text"] for note in notes if note["x"] == 1] == ["2", "1", "1.5"]


def test_the_page_has_the_table_and_the_plot() -> None:
    """The page of a sweep names its best run, and shows runs without a folder in the table."""
    page = sweep_page(RESULT)
    assert dict(page.cards)["failed"] == "1"
    assert dict(page.cards)["best"].startswith("lr=0.001 schedule=cosine(): accuracy 0.3000")
    assert [section.title for section in page.sections] == ["Runs", "Settings and results"]
    html = render(page)
    assert "ValueError: &lt;no&gt;" in html
