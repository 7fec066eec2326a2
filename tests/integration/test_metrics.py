"""What a run measures about itself: time, waiting, each rank's share, operations."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands, read_lines

from launcher.runs.history import History
from launcher.runs.rundir import RunDir

STRAGGLING = ROOT / "tests/recipes/straggling.py"


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl that describe steps."""
    return [row for row in read_lines(run_dir / "metrics.jsonl") if "grad_norm" in row]


@pytest.fixture(scope="module")
def runs(module_run: Commands) -> Path:
    """Train under DDP with a rank that pauses, under FSDP, and on one rank."""
    for name, arguments in {
        "ddp": (STRAGGLING, "-n", "2"),
        "timed": (STRAGGLING, "-n", "2", "timed=true", "micro_batch_size=16"),
        "fsdp": ("digits", "-n", "2", "strategy=fsdp"),
        "alone": ("digits", "-n", "1"),
    }.items():
        done = module_run("launcher", "run", *arguments, "steps=60", "--out", name)
        assert done.exit_code == 0, done.stderr
    return module_run.folder


def test_steps_have_a_time(runs: Path) -> None:
    """Times of steps increase, lie within the run, and add up to no more than its duration."""
    rows = rows_of(runs / "ddp")
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    events = read_lines(runs / "ddp/events.jsonl")
    assert events[0]["time"] < times[0] < times[-1] < events[-1]["time"]
    assert all(row["step_seconds"] > 0 for row in rows)
    total = sum(row["step_seconds"] for row in rows[1:])
    assert total <= times[-1] - times[0] + 0.01, "evaluations are not steps"


def test_the_momentum_used_is_written(runs: Path) -> None:
    """1cycle has its smallest momentum at its largest learning rate."""
    rows = rows_of(runs / "alone")
    peak = max(rows, key=lambda row: row["lr"])
    assert peak["momentum"] == pytest.approx(0.85)
    assert rows[-1]["momentum"] == pytest.approx(0.95)


def test_waiting_for_others_is_measured(runs: Path) -> None:
    """Under DDP, a rank waits about as long as the other pauses, and own times differ by that."""
    rows = rows_of(runs / "ddp")[10:]
    waited = sum(row["communication_seconds"] for row in rows) / len(rows)
    assert waited > 0.005, "a pause of 20 ms on one of two ranks is 10 ms on average"
    ranks = [row["ranks"] for row in read_lines(runs / "ddp/metrics.jsonl") if "ranks" in row][-1]
    zero, one = ranks["own_seconds"]
    assert one > zero + 0.005
    assert all(num_bytes > 2**20 for num_bytes in ranks["memory_bytes"])
    assert len(ranks["data_wait_seconds"]) == 2


def test_passes_end_before_the_wait_for_others(runs: Path) -> None:
    """The time of a rank's passes excludes its wait for gradients, in DDP as it is."""
    rows = rows_of(runs / "timed")[10:]
    step_seconds = sum(row["step_seconds"] for row in rows) / len(rows)
    metrics = read_lines(runs / "timed/metrics.jsonl")
    zero, one = [row["ranks"] for row in metrics if "ranks" in row][-1]["device_seconds"]
    assert one > zero + 0.015, "rank 1 pauses for 20 ms in each of one or two micro-steps"
    assert step_seconds > zero + 0.015, "rank 0 waits for it"
    untimed = [row["ranks"] for row in read_lines(runs / "ddp/metrics.jsonl") if "ranks" in row]
    assert untimed[-1]["device_seconds"] is None


def test_what_cannot_be_measured_is_null(runs: Path) -> None:
    """The communication wait is 0 on one rank, and null under FSDP."""
    assert {row["communication_seconds"] for row in rows_of(runs / "alone")} == {0.0}
    assert {row["communication_seconds"] for row in rows_of(runs / "fsdp")} == {None}
    ranks = [row["ranks"] for row in read_lines(runs / "fsdp/metrics.jsonl") if "ranks" in row][-1]
    assert ranks["own_seconds"] is None
    assert len(ranks["memory_bytes"]) == 2


def test_operations_are_counted(runs: Path) -> None:
    """Operations are two for each multiply-add of convolutions and products, in every strategy."""
    convolutions = 9 * 1 * 32 * 64 + 9 * 32 * 64 * 64
    products = 64 * 4 * 4 * 128 + 128 * 10
    for name in ("ddp", "fsdp", "alone"):
        counted = [e for e in read_lines(runs / name / "events.jsonl") if e["event"] == "counted"]
        assert len(counted) == 1, name
        assert counted[0]["flops_per_sample"] == 2 * (convolutions + products)
    history = History(RunDir(runs / "alone"))
    speed = history.typical("samples_per_second")
    assert speed is not None
    assert history.flops_per_second() == pytest.approx(3 * counted[0]["flops_per_sample"] * speed)


def test_a_history_reads_on_where_it_stopped(runs: Path, tmp_path: Path) -> None:
    """A line that is still being written is read at the next refresh; a damaged one is skipped."""
    copy = RunDir(tmp_path)
    content = (runs / "alone/metrics.jsonl").read_bytes()
    (tmp_path / "run.yaml").write_bytes((runs / "alone/run.yaml").read_bytes())
    lines = content.splitlines(keepends=True)
    copy.metrics.write_bytes(lines[0] + lines[1][:20])
    history = History(copy)
    assert list(history.steps["step"]) == [1]
    with copy.metrics.open("ab") as file:
        file.write(lines[1][20:] + b"{damaged\n" + b"".join(lines[2:]))
    history.refresh()
    expected = [row["step"] for row in rows_of(runs / "alone")]
    assert list(history.steps["step"]) == expected
    copy.metrics.write_bytes(b"".join(lines[:5]))  # as a run does that resumes from a checkpoint
    history.refresh()
    assert history.last_step <= 5
    assert [row["step"] for row in read_lines(copy.metrics)] == [
        row["step"] for row in read_lines(copy.metrics)
    ]
