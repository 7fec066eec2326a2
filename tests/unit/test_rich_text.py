"""What notebooks show: plots, results and post-mortems as HTML."""

from __future__ import annotations

import math
import re
import signal
from pathlib import Path
from xml.etree import ElementTree as ET

import pytest

from launcher.runs.failure_record import Failure, RunFailedError
from launcher.runs.run_result import RunResult
from launcher.runs.rundir import RunDir
from launcher.svg import svg_plot

POST_MORTEM = """the run failed on rank 1 (node)

Traceback (most recent call last):
  File "mine.py", line 3, in loss

ValueError: <b>&

last seen: rank 0: step 3, computing

next: `launcher resume runs/a` resumes the run from step 2"""


def test_a_plot_is_a_well_formed_element() -> None:
    """A gap divides a curve, every point is inside of the plot, and names are escaped."""
    steps = list(range(2000))
    losses = [math.nan if 900 < step < 1100 else math.sin(step / 50) for step in steps]
    text = svg_plot({"a<b": (steps, losses), "one": ([5], [0.5])}, "step", "loss")
    root = ET.fromstring(text)
    lines = [element for element in root if element.tag.endswith("polyline")]
    assert len(lines) == 2
    points = [
        tuple(map(float, point.split(",")))
        for line in lines
        for point in line.get("points", "").split()
    ]
    assert 100 < len(points) < 400
    assert all(0 <= x <= 640 and 0 <= y <= 240 for x, y in points)
    assert sum(element.tag.endswith("circle") for element in root) == 1


@pytest.mark.parametrize("values", [[], [math.nan], [3.0, 3.0], [0.0], [1e-12, 1e12]])
def test_any_values_are_drawn(values: list[float]) -> None:
    """Curves without points, without a range and with a huge one are drawn."""
    ET.fromstring(svg_plot({"loss": (range(len(values)), values)}, "step", "loss"))


def test_a_result_shows_metrics_or_how_to_continue() -> None:
    """A finished run shows its metrics, and a stopped one the call that continues it."""
    run_dir = RunDir(Path("/runs/<a>"))
    metrics = {"loss": 0.5, "accuracy": 0.25}
    finished = RunResult(run_dir=run_dir, finished=True, step=3, metrics=metrics)
    text = re.sub("<[^>]*>", " ", finished._repr_html_())
    assert re.search(r"accuracy\s+0\.2500\s+loss\s+0\.5000", text)
    assert "&lt;a&gt;" in text
    stopped = RunResult(
        run_dir=run_dir, finished=False, step=2, metrics={}, stopped_by=signal.SIGINT, exit_code=75
    )
    assert "stopped by SIGINT after step 2" in stopped._repr_html_()
    assert "launcher.resume(" in stopped._repr_html_()


def test_a_post_mortem_is_escaped_and_in_order() -> None:
    """The traceback stands between what failed and what to do; IPython shows no other traceback."""
    failure = Failure(
        rank=1, node="node", pid=1, time=0.0, error="ValueError", message="", exit_code=1
    )
    error = RunFailedError(POST_MORTEM, failure)
    text = error._repr_html_()
    assert "ValueError: &lt;b&gt;&amp;" in text
    places = [text.index(words) for words in ("rank 1 (node)", "ValueError", "last seen", "next")]
    assert places == sorted(places)
    assert len(error._render_traceback_()) == len(POST_MORTEM.splitlines())
    error.is_shown = True
    assert error._render_traceback_() == ["RunFailedError: the run failed on rank 1 (node)"]
