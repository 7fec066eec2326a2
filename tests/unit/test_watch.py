"""`launcher watch` and `launcher runs`, states of runs, and the output of a run itself."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from launcher.console.colours import colour_state
from launcher.console.progress import sparkline
from launcher.console.run_table import RunRow, sort_rows
from launcher.runs.heartbeat import Heartbeat
from launcher.runs.status import is_alive
from launcher.warm.edited_recipe import module_times


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


def test_packages_and_relative_imports_are_followed(tmp_path: Path) -> None:
    """Edits are found in a recipe, in modules that it imports, and in the packages above those."""
    texts = {
        "recipe.py": "import nets.blocks.conv",
        "nets/__init__.py": "from sizes import WIDTH",
        "nets/blocks/__init__.py": "",
        "nets/blocks/conv.py": "from ..base import Base\nfrom . import norm\nfrom .... import x",
        "nets/blocks/norm.py": "",
        "nets/base.py": "",
        "sizes.py": "WIDTH = 3",
    }
    for name, text in {**texts, "other.py": "", "nets/other.py": ""}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    found = module_times(tmp_path / "recipe.py")
    assert {str(path.relative_to(tmp_path)) for path in found} == set(texts)
