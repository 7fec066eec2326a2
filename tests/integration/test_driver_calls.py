"""The process that forks the ranks leaves the driver of the GPUs alone."""

from __future__ import annotations

import json
from typing import Any

import pytest
from driver_calls import ACTIONS, CASES, choosing
from support import ROOT, Commands

from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

CHOOSING = ROOT / "tests/recipes/choosing.py"
FORKED = [(action, case) for action, cases in ACTIONS.items() for case in cases]


@pytest.fixture(scope="module")
def measured(module_run: Commands) -> dict[str, Any]:
    """Take every action in its cases, with a recorder in the driver's place."""
    file = module_run.folder / "calls.json"
    done = module_run("python", "-W", "ignore", ROOT / "tests/driver_calls.py", file)
    assert done.exit_code == 0, done.stderr[-3000:]
    results: dict[str, Any] = json.loads(file.read_text())
    return results


@pytest.mark.parametrize(
    ("action", "case"),
    [(action.__name__, case) for action, case in FORKED if action is not choosing],
)
def test_nothing_calls_the_driver_before_the_ranks_are_forked(
    measured: dict[str, Any], action: str, case: str
) -> None:
    """Shipped recipes, plans and the imports of ranks make no call, whatever NVML answers."""
    assert measured[f"{action}: {case}"] == {"calls": [], "reason": None}


@pytest.mark.parametrize("case", CASES)
def test_a_recipe_may_ask_for_a_gpu_when_it_is_imported(
    measured: dict[str, Any], case: str
) -> None:
    """The question reaches the driver only where NVML cannot answer; then ranks are not forked."""
    result = measured[f"choosing: {case}"]
    if case == "NVML works":
        assert result == {"calls": [], "reason": None}
    else:
        assert len(result["calls"]) == 1
        assert "_cuda_getDeviceCount" in result["calls"][0]
        assert "choosing.py" in result["calls"][0]
        assert result["reason"] == "initialised CUDA"


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero2"])
def test_cpu_ranks_open_no_gpu(run: Commands, strategy: str) -> None:
    """On a machine with GPUs device=cpu forks ranks that never initialise CUDA, even to save."""
    done = run(
        *("python", ROOT / "tests/driver_calls.py", "calls", "NVML works"),
        *("run", CHOOSING, "-n", "2", "--out", "out", "device=cpu", f"strategy={strategy}"),
    )
    assert done.exit_code == 0, done.stderr
    assert len(list_checkpoints(RunDir(run.folder / "out"))) == 1
    calls = (run.folder / "calls").read_text().splitlines()
    beats = [json.loads(path.read_text()) for path in run.folder.glob("out/health/rank*.json")]
    ranks = {beat["pid"] for beat in beats}
    assert len(ranks) == 2
    assert all(int(call.split()[0]) in ranks for call in calls), "the launcher called the driver"
    assert {call.split()[1] for call in calls} <= {"_cuda_getDeviceCount"}


def test_ranks_are_spawned_after_the_recipe_has_called_the_driver(run: Commands) -> None:
    """With MIG a recipe that asks for a GPU at import trains in a new interpreter, as it says."""
    done = run(
        *("python", ROOT / "tests/driver_calls.py", "calls", "MIG"),
        *("run", CHOOSING, "-n", "1", "--out", "out", "device=cpu"),
    )
    assert done.exit_code == 0, done.stderr
    assert done.stderr.count("initialised CUDA") == 1
    assert json.loads((run.folder / "out/result.json").read_text())["steps"] == 4
    [call] = (run.folder / "calls").read_text().splitlines()
    assert "choosing.py" in call
