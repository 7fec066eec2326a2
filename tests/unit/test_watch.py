"""`launcher watch` and `launcher runs`, states of runs, and the output of a run itself."""

from __future__ import annotations

import os
import time

import pytest

from launcher.console.colours import colour_state
from launcher.console.progress import sparkline
from launcher.console.run_table import RunRow, sort_rows
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.status import is_alive


def test_only_the_state_is_coloured() -> None:
    """A folder with the name of a state is not coloured."""
    assert colour_state("failed/1  failed  x", "failed") == "failed/1  \x1b[31mfailed\x1b[0m  x"


def test_liveness_of_ranks() -> None:
    """A remote rank is alive while its heartbeat is fresh, a local one while its process exists."""
    values = {"rank": 0, "step": 1, "phase": "computing", "since": 0.0}
    now = time.time()
    assert is_alive(Heartbeat(node="elsewhere", pid=1, time=now, **values))  # type: ignore[arg-type]
    assert not is_alive(Heartbeat(node="elsewhere", pid=1, time=now - 60, **values))  # type: ignore[arg-type]
    here = os.uname().nodename
    assert is_alive(Heartbeat(node=here, pid=os.getpid(), time=now - 60, **values))  # type: ignore[arg-type]
    assert not is_alive(Heartbeat(node=here, pid=2**22 + 1, time=now, **values))  # type: ignore[arg-type]


def test_rows_without_the_value_come_last() -> None:
    """Rows without the value sort last in either direction."""

    def row(name: str, **result: float) -> RunRow:
        return RunRow(
            run=name,
            state="finished",
            words="",
            recipe="x",
            ranks=1,
            strategy="ddp",
            step=1,
            total_steps=1,
            result=result,
            seconds=None,
            began=None,
            settings={},
        )

    rows = [row("none"), row("low", accuracy=0.1), row("high", accuracy=0.9)]
    for reverse, names in ((False, ["low", "high", "none"]), (True, ["high", "low", "none"])):
        ordered_rows = sort_rows(rows, "accuracy", reverse=reverse)
        assert [ordered_row.run for ordered_row in ordered_rows] == names


@pytest.mark.parametrize(
    ("values", "width", "shown"),
    [
        ([], 5, ""),
        ([1.0, float("nan")], 5, "▁"),
        ([0.0, 1.0, 2.0, 3.0], 4, "▁▃▆█"),
        (list(range(80)), 8, "▁▂▃▄▅▆▇█"),
    ],
)
def test_sparklines(values: list[float], width: int, shown: str) -> None:
    """Values are averaged to `width` blocks, from the lowest block to the highest."""
    assert sparkline(values, width) == shown
