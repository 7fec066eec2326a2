"""Shares of a run's time, read from its history."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path
from typing import Any

import pytest
from examples import LAPTOP, recipe

from launcher import History, make_plan
from launcher.analysis.time_shares import (
    mean_device_seconds,
    mean_own_seconds,
    own_seconds,
    stragglers_text,
)
from launcher.report.page import render
from launcher.report.run_page import run_page
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir


def history_of(folder: Path, rank_rows: list[dict[str, Any]]) -> History:
    """Return the history of a run that wrote these measurements of its ranks."""
    run_dir = RunDir(folder)
    write_run(run_dir, RunRecord(recipe="some.py:some", plan=make_plan(recipe(), LAPTOP).to_dict()))
    lines = [json.dumps({"step": step, "ranks": row}) for step, row in enumerate(rank_rows, 1)]
    run_dir.metrics.write_text("\n".join(lines) + "\n")
    return History(run_dir)


def row(
    world_size: int, own: list[float] | None, device: list[float] | None = None
) -> dict[str, Any]:
    """Return the measurements of ranks as metrics.jsonl holds them."""
    return {
        "device_seconds": device,
        "own_seconds": own,
        "data_wait_seconds": [0.0] * world_size,
        "memory_bytes": [1] * world_size,
    }


def test_times_of_another_world_are_left_out(tmp_path: Path) -> None:
    """After a resumption on more ranks, only times of the present ranks count, if there are any."""
    two, three = row(2, [0.1, 0.2]), row(3, [0.1, 0.2, 0.3])
    assert own_seconds(history_of(tmp_path, [two, three])) == [(2, [0.1, 0.2, 0.3])]
    history = history_of(tmp_path, [two, two, row(3, None)])
    assert mean_own_seconds(history) is None
    assert "host memory of each rank" in render(run_page(history))


@pytest.mark.parametrize(
    ("device", "named", "on_host"),
    [
        ([0.1, 0.1, 0.1, 0.2], ["rank 3 (2.5x)", "rank 3 (2x)"], False),
        ([0.1, 0.1, 0.1, 0.1], ["rank 3 (2.5x)"], True),
        (None, ["rank 3 (2.5x)"], False),
    ],
)
def test_a_slow_gpu_and_a_slow_host_are_told_apart(
    tmp_path: Path, device: list[float] | None, named: list[str], *, on_host: bool
) -> None:
    """A straggler is named once for its whole step, and again if its GPU takes longer."""
    rows = [row(4, [0.12, 0.12, 0.12, 0.3], device)] * 3
    history = history_of(tmp_path, rows)
    measured = mean_device_seconds(history)
    assert measured == (None if device is None else pytest.approx(device))
    text = stragglers_text(mean_own_seconds(history) or [], measured)
    assert re.findall(r"rank \d \([\d.]+x\)", text) == named
    assert ("host" in text) == on_host
    page = html.unescape(render(run_page(history)))
    assert ("passes on the GPU of each rank" in page) == (device is not None)
    assert text.split("`")[0] in page


def test_a_slow_gpu_alone_is_named() -> None:
    """A GPU that is slower is named although its rank's whole step is not."""
    assert "rank 1 (2x)" in stragglers_text([0.5, 0.5, 0.5], [0.1, 0.2, 0.1])
    assert stragglers_text([0.5, 0.5], [0.1, 0.1]) == "No rank is much slower than the others."
