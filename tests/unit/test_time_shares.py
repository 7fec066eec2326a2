"""Shares of a run's time, read from its history."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from examples import LAPTOP, recipe

from launcher import History, make_plan
from launcher.analysis.time_shares import mean_own_seconds, own_seconds
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


def row(world_size: int, own: list[float] | None) -> dict[str, Any]:
    """Return the measurements of ranks as metrics.jsonl holds them."""
    return {
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
