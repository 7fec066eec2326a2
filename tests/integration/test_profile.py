"""`launcher profile`: the time of a step by part, in real and in synthetic traces."""

from __future__ import annotations

import gzip
import json

import pytest
from support import ROOT, Commands

from launcher.analysis.step_profile import PARTS

STRAGGLING = ROOT / "tests/recipes/straggling.py"


@pytest.fixture(scope="module")
def profiled(module_run: Commands) -> Commands:
    """Profile four steps of two ranks, one of which pauses for 20 ms in each forward."""
    done = module_run(
        *("launcher", "profile", STRAGGLING, "-n", "2", "--steps", "4", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    (module_run.folder / "stdout").write_text(done.stdout)
    return module_run


def test_a_straggler_is_identified(profiled: Commands) -> None:
    """The pause is forward on the rank that takes it and communication on the rank that waits."""
    text = (profiled.folder / "stdout").read_text()
    assert "wait for rank 1" in text
    zero, one = json.loads((profiled.folder / "out/profile.json").read_text())["ranks"]
    assert one["parts"]["forward"] > zero["parts"]["forward"] + 0.015
    assert zero["parts"]["communication"] > one["parts"]["communication"] + 0.01
    for rank in (zero, one):
        assert rank["steps"] == 4
        assert sum(rank["parts"].values()) == pytest.approx(rank["step_seconds"], rel=1e-6)
        assert list(rank["parts"]) == list(PARTS)
        assert rank["parts"]["backward"] > 0
    assert zero["step_seconds"] == pytest.approx(one["step_seconds"], rel=0.25)


def test_each_rank_leaves_a_trace(profiled: Commands) -> None:
    """Each trace has named operations, the parts of a step, and the profiled steps."""
    for rank in range(2):
        path = profiled.folder / f"out/traces/rank{rank}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {event["name"] for event in events}
        assert {"launcher::forward", "launcher::backward", "aten::convolution"} <= names
        assert sum(name.startswith("ProfilerStep#") for name in names) == 4


def test_the_table_has_all_ranks(profiled: Commands) -> None:
    """The table has a line for each rank and one for their mean, whose shares add up to 100 %."""
    lines = (profiled.folder / "stdout").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("rank "))
    assert lines[head].split() == ["rank", "ms/step", *PARTS]
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["0", "1", "mean"]
    for line in lines[head + 1 : head + 4]:
        shares = [int(cell.rstrip("%")) for cell in line.split()[2:]]
        assert sum(shares) == pytest.approx(100, abs=4)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_sharded_strategies_are_profiled(run: Commands, strategy: str) -> None:
    """Under FSDP and ZeRO a profile has communication and every part of a step."""
    done = run(
        *("launcher", "profile", "digits", "-n", "2", "--steps", "3", "--json"),
        f"strategy={strategy}",
    )
    assert done.exit_code == 0, done.stderr
    for rank in json.loads(done.stdout):
        parts = rank["parts"]
        assert parts["communication"] > 0
        assert parts["optimizer"] > 0
        assert min(parts["forward"], parts["backward"]) > 0
