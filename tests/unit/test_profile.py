"""`launcher profile`: the time of a step by part, in real and in synthetic traces."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from launcher.analysis.step_profile import PARTS, Profile, advice, holds_kernels, read_profile
from launcher.environment.machine import read_machine
from launcher.planning.plan import Plan
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve
from launcher.runs.plan_recipe import plan_recipe


def write(path: Path, events: list[dict[str, Any]]) -> Path:
    """Write a trace of duration events, with times in microseconds."""
    complete = [{"ph": "X", "tid": 1} | event for event in events]
    path.write_text(json.dumps({"traceEvents": [*complete, {"ph": "M", "name": "process_name"}]}))
    return path


def annotation(name: str, ts: float, dur: float, **fields: Any) -> dict[str, Any]:
    """Return an event for a range of Python code."""
    return {"cat": "user_annotation", "name": name, "ts": ts, "dur": dur} | fields


def test_a_trace_of_cpus_is_accounted_for(tmp_path: Path) -> None:
    """Communication counts where nothing computes, whichever part of the step Python is in."""
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
    result = read_profile(write(tmp_path / "trace.json", events))
    assert result.steps == 2
    assert result.step_seconds == pytest.approx(100e-6)
    expected = {
        "data": 10,
        "forward": 30,
        "backward": 2 + 18 + 5,
        "communication": 15,
        "optimizer": 10,
        "other": 110,
    }
    assert {part: round(value * 2e6, 6) for part, value in result.parts.items()} == expected
    assert dict(result.operations)["aten::mm"] == pytest.approx(7.5e-6), "without aten::mul"


def launch(ts: float, correlation: int, **fields: Any) -> dict[str, Any]:
    """Return an event for the call that launches a kernel."""
    event = {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": ts, "dur": 1}
    return event | {"args": {"correlation": correlation, "External id": 5}} | fields


def kernel(name: str, ts: float, dur: float, correlation: int, **fields: Any) -> dict[str, Any]:
    """Return an event for a kernel on the GPU."""
    event = {"cat": "kernel", "name": name, "ts": ts, "dur": dur, "tid": 20}
    return event | {"args": {"correlation": correlation, "stream": 7}} | fields


def test_a_trace_of_a_gpu_is_accounted_for(tmp_path: Path) -> None:
    """Kernels count for the part that launched them, from any thread and however much later."""
    events = [
        annotation("ProfilerStep#5", 0, 100),
        annotation("launcher::data", 0, 12),
        annotation("launcher::forward", 12, 6),
        annotation("launcher::backward", 18, 7),
        annotation("launcher::optimizer", 25, 5),
        {"cat": "cpu_op", "name": "aten::mm", "ts": 12, "dur": 5},
        launch(11, 1),
        launch(13, 2),
        launch(19, 3, tid=2),  # by the thread of autograd
        launch(21, 4, tid=2),
        launch(26, 5),
        kernel("Memcpy HtoD (Pinned -> Device)", 18, 4, 1, cat="gpu_memcpy"),
        kernel("gemm", 25, 20, 2),
        kernel("gemm", 45, 25, 3),
        kernel("ncclDevKernel_AllReduce_Sum_f32_RING_LL", 60, 20, 4, tid=24),
        kernel("fused_sgd", 80, 5, 5),
    ]
    result = read_profile(write(tmp_path / "trace.json", events))
    expected = {
        "data": 12 + 4,
        "forward": 20,
        "backward": 25,
        "communication": 10,
        "optimizer": 5,
        "other": 6 + 3 + 15,
    }
    assert {part: round(value * 1e6, 6) for part, value in result.parts.items()} == expected
    assert dict(result.operations)["gemm"] == pytest.approx(45e-6)


def test_kernels_without_a_launch_count_at_their_own_time(tmp_path: Path) -> None:
    """A kernel whose launch the trace lacks counts for what Python does while the kernel runs."""
    events = [
        annotation("ProfilerStep#5", 0, 100),
        annotation("launcher::forward", 0, 50),
        kernel("gemm", 20, 40, 9),
    ]
    result = read_profile(write(tmp_path / "trace.json", events))
    assert result.parts["forward"] == pytest.approx(40e-6)
    assert result.parts["other"] == pytest.approx(60e-6)


def test_a_trace_without_kernels_is_recognised(tmp_path: Path) -> None:
    """A trace of a GPU whose driver forbids profiling has operations and no kernels."""
    operation = {"cat": "cpu_op", "name": "aten::mm", "ts": 15, "dur": 20}
    assert not holds_kernels(write(tmp_path / "cpu.json", [operation]))
    assert holds_kernels(write(tmp_path / "gpu.json", [operation, kernel("gemm", 20, 40, 9)]))


@pytest.mark.parametrize("content", ["{", '{"traceEvents": []}', '{"other": 1}'])
def test_a_file_that_is_not_a_trace_is_refused(tmp_path: Path, content: str) -> None:
    """A file without profiled steps raises ValueError."""
    (tmp_path / "trace.json").write_text(content)
    with pytest.raises(ValueError, match=r"trace\.json|ProfilerStep#"):
        read_profile(tmp_path / "trace.json")


def make_plan(*arguments: str) -> Plan:
    """Return the plan of digits with overrides."""
    _, plan = plan_recipe(resolve("digits"), read_arguments(arguments), read_machine())
    return plan


def make_profile(**parts: float) -> Profile:
    """Return a profile of a 100 ms step with these milliseconds and the rest in forward."""
    values = dict.fromkeys(PARTS, 0.0) | {name: ms / 1e3 for name, ms in parts.items()}
    values["forward"] += 0.1 - sum(values.values())
    return Profile(steps=1, step_seconds=0.1, parts=values, operations=[])


def test_advice_is_about_the_largest_parts() -> None:
    """Advice is sorted by share, largest first, and names the settings and commands to use."""
    communication, data = advice(
        [make_profile(data=20, communication=40)], make_plan("in_memory=false", "num_workers=2")
    )
    assert communication.startswith("40%: ")
    assert "communication" in communication
    assert data.startswith("20%: ")
    assert "num_workers=2 " in data
    assert "`launcher find loader`" in data
    [other] = advice([make_profile(other=30)], make_plan())
    assert other.startswith("30%: ")
    [optimizer] = advice([make_profile(optimizer=30)], make_plan())
    assert "launcher find noise" in optimizer


def test_a_balanced_step_has_no_advice() -> None:
    """A step of forward and backward has a single line without a share."""
    [line] = advice([make_profile()], make_plan())
    assert "%" not in line


def test_advice_names_a_straggler() -> None:
    """Advice names the rank that the others wait for, and how much more work it has."""
    profiles = [make_profile(communication=50), make_profile(communication=5)]
    [line] = advice(profiles, make_plan())
    assert "rank 1, " in line
    assert "1.90 times" in line
