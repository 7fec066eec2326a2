"""Where the time of a step goes: real traces of real ranks, and traces that are known."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands

from launcher.analysis.step_profile import PARTS, Profile, advice, read_profile
from launcher.environment.machine import read_machine
from launcher.planning.plan import Plan
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve
from launcher.runs.job import plan_recipe

STRAGGLING = ROOT / "tests/recipes/straggling.py"


@pytest.fixture(scope="module")
def profiled(module_run: Commands) -> Commands:
    """Look at four steps of two ranks, of which one pauses for 20 ms in each forward."""
    done = module_run(
        *("launcher", "profile", STRAGGLING, "-n", "2", "--steps", "4", "--out", "out"),
    )
    assert done.exit_code == 0, done.stderr
    (module_run.folder / "said").write_text(done.stdout)
    return module_run


def test_ranks_are_told_apart(profiled: Commands) -> None:
    """The pause is forward on the rank that takes it, and communication on the one that waits."""
    text = (profiled.folder / "said").read_text()
    assert "Ranks wait for rank 1" in text
    zero, one = json.loads((profiled.folder / "out/profile.json").read_text())["ranks"]
    assert one["parts"]["forward"] > zero["parts"]["forward"] + 0.015
    assert zero["parts"]["communication"] > one["parts"]["communication"] + 0.01
    for rank in (zero, one):
        assert rank["steps"] == 4
        assert sum(rank["parts"].values()) == pytest.approx(rank["step_seconds"], rel=1e-6)
        assert list(rank["parts"]) == list(PARTS)
        assert rank["parts"]["backward"] > 0
    assert abs(zero["step_seconds"] - one["step_seconds"]) < 0.01


def test_each_rank_leaves_a_trace(profiled: Commands) -> None:
    """They can be opened by Perfetto; operations have their names in them."""
    for rank in range(2):
        path = profiled.folder / f"out/traces/rank{rank}.json.gz"
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
        names = {event["name"] for event in events}
        assert {"launcher::forward", "launcher::backward", "aten::convolution"} <= names
        assert sum(name.startswith("ProfilerStep#") for name in names) == 4


def test_the_table_has_all_ranks(profiled: Commands) -> None:
    """A line for each rank and their mean, then the longest operations and the advice."""
    lines = (profiled.folder / "said").read_text().splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("rank "))
    assert lines[head].split() == ["rank", "ms", "a", "step", *PARTS]
    assert [line.split()[0] for line in lines[head + 1 : head + 4]] == ["0", "1", "mean"]
    for line in lines[head + 1 : head + 4]:
        shares = [int(cell.rstrip("%")) for cell in line.split()[2:]]
        assert sum(shares) == pytest.approx(100, abs=4)


@pytest.mark.parametrize("strategy", ["fsdp", "zero2"])
def test_strategies_are_looked_at(run: Commands, strategy: str) -> None:
    """Under sharding there is communication, and no part of a step is lost."""
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


def write(path: Path, events: list[dict[str, Any]]) -> Path:
    """Write a trace, times in microseconds."""
    whole = [{"ph": "X", "tid": 1} | event for event in events]
    path.write_text(json.dumps({"traceEvents": [*whole, {"ph": "M", "name": "process_name"}]}))
    return path


def annotation(name: str, ts: float, dur: float, **more: Any) -> dict[str, Any]:
    """Return a range that Python is in."""
    return {"cat": "user_annotation", "name": name, "ts": ts, "dur": dur} | more


def test_a_trace_of_cpus_is_accounted_for(tmp_path: Path) -> None:
    """Computing hides communication; what of it is left is communication, whatever Python is in."""
    events = [
        annotation("ProfilerStep#5", 0, 100),
        annotation("ProfilerStep#6", 100, 100),
        annotation("launcher::data", 0, 10),
        annotation("launcher::forward", 10, 30),
        annotation("launcher::backward", 40, 40),
        annotation("launcher::optimizer", 80, 10),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 15, "dur": 20},
        {"cat": "cpu_op", "name": "aten::mul", "ts": 20, "dur": 5},
        {"cat": "cpu_op", "name": "MmBackward0", "ts": 42, "dur": 18},
        {"cat": "cpu_op", "name": "c10d::allreduce_", "ts": 59, "dur": 2},
        annotation("gloo:all_reduce", 50, 25, tid=7),
        {"cat": "cpu_op", "name": "aten::copy_", "ts": 60, "dur": 15, "tid": 7},
    ]
    found = read_profile(write(tmp_path / "trace.json", events))
    assert found.steps == 2
    assert found.step_seconds == pytest.approx(100e-6)
    expected = {
        "data": 10,
        "forward": 30,
        "backward": 2 + 18 + 5,
        "communication": 15,
        "optimizer": 10,
        "other": 110,
    }
    assert {k: round(v * 2e6, 6) for k, v in found.parts.items()} == expected
    assert dict(found.operations)["aten::mm"] == pytest.approx(7.5e-6), "less what it called"


def test_a_trace_of_a_gpu_is_accounted_for(tmp_path: Path) -> None:
    """On the GPU's own clock: kernels by who asked for them, NCCL where nothing else runs, idle."""
    gpu = {"tid": 20}
    events = [
        annotation("ProfilerStep#5", 0, 100),
        annotation("launcher::data", 0, 20),
        annotation("launcher::forward", 20, 10),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 20, "dur": 5},
        {"cat": "gpu_user_annotation", "name": "launcher::data", "ts": 18, "dur": 4} | gpu,
        {"cat": "gpu_user_annotation", "name": "launcher::forward", "ts": 25, "dur": 20} | gpu,
        {"cat": "gpu_user_annotation", "name": "launcher::backward", "ts": 45, "dur": 25} | gpu,
        {"cat": "gpu_memcpy", "name": "Memcpy HtoD (Pinned -> Device)", "ts": 18, "dur": 4} | gpu,
        {"cat": "kernel", "name": "gemm", "ts": 25, "dur": 20} | gpu,
        {"cat": "kernel", "name": "gemm", "ts": 45, "dur": 25} | gpu,
        {"cat": "kernel", "name": "ncclDevKernel_AllReduce_Sum_f32_RING_LL", "ts": 60, "dur": 20}
        | {"tid": 24},
    ]
    found = read_profile(write(tmp_path / "trace.json", events))
    expected = {
        "data": 18 + 4,
        "forward": 20,
        "backward": 25,
        "communication": 10,
        "optimizer": 0,
        "other": 3 + 20,
    }
    assert {k: round(v * 1e6, 6) for k, v in found.parts.items()} == expected
    assert dict(found.operations)["gemm"] == pytest.approx(45e-6)


@pytest.mark.parametrize("content", ["{", '{"traceEvents": []}', '{"other": 1}'])
def test_what_is_no_trace_is_refused(tmp_path: Path, content: str) -> None:
    """With a reason."""
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(ValueError, match=r"no trace|no step"):
        read_profile(tmp_path / "trace.json")


def plan(*arguments: str) -> Plan:
    """Return a plan of digits."""
    _, made = plan_recipe(resolve("digits"), read_arguments(arguments), read_machine())
    return made


def profile(**parts: float) -> Profile:
    """Return a profile with these milliseconds, the rest of 100 forward."""
    values = dict.fromkeys(PARTS, 0.0) | {name: ms / 1e3 for name, ms in parts.items()}
    values["forward"] += 0.1 - sum(values.values())
    return Profile(steps=1, step_seconds=0.1, parts=values, operations=[])


def test_advice_is_for_what_takes_the_time() -> None:
    """The largest part first; nothing where nothing stands out."""
    both = advice([profile(data=20, communication=40)], plan("in_memory=false", "num_workers=2"))
    assert both[0].startswith("40%: Ranks wait for communication")
    assert both[1].startswith("20%: Steps wait for data (2 workers per rank are too few)")
    assert advice([profile()], plan()) == [
        "Nothing stands out: the step is mostly forward and backward."
    ]
    uneven = advice([profile(communication=50), profile(communication=5)], plan())
    assert "wait for rank 1, which has 1.90 times as much" in uneven[0]
    [own] = advice([profile(other=30)], plan())
    assert own.startswith("30%: Much is neither the model nor its data")
    [optimizer] = advice([profile(optimizer=30)], plan())
    assert "find noise" in optimizer
