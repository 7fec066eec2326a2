"""What a run measures about itself: time, waiting, each rank's share, operations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands, read_lines

from launcher.analysis.device_peaks import peak_flops
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.rank_times import CommunicationClock, RankTotals, combine_rank_rows
from launcher.environment.machine import read_machine
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.runs.history import History
from launcher.runs.plan_recipe import plan_recipe
from launcher.runs.rundir import RunDir, read_rows

STRAGGLING = ROOT / "tests/recipes/straggling.py"


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of metrics.jsonl that describe steps."""
    return [row for row in read_lines(run_dir / "metrics.jsonl") if "grad_norm" in row]


@pytest.fixture(scope="module")
def runs(module_run: Commands) -> Path:
    """Train under DDP with a rank that pauses, under FSDP, and on one rank."""
    for name, arguments in {
        "ddp": (STRAGGLING, "-n", "2"),
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
    assert one > zero + 0.01
    assert all(num_bytes > 2**20 for num_bytes in ranks["memory_bytes"])
    assert len(ranks["data_wait_seconds"]) == 2


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
    assert [row["step"] for row in read_rows(copy.metrics)] == [
        row["step"] for row in read_lines(copy.metrics)
    ]


def test_the_communication_clock_takes_differences_of_totals() -> None:
    """The wait per step is that since the last call, or the last one if no step was timed."""
    totals: list[tuple[float, int] | None] = [(1.0, 10), (1.0, 10), (4.0, 20), None]
    clock = CommunicationClock(lambda: totals.pop(0))
    assert [clock.per_step() for _ in range(4)] == [
        pytest.approx(0.1),
        pytest.approx(0.1),
        pytest.approx(0.3),
        None,
    ]


def test_rank_rows_become_rarer_with_time_and_with_ranks() -> None:
    """Rank rows are a second apart, then a hundredth of the time; with many ranks still rarer."""
    _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=1)
    backend = LocalBackend(digits(), plan)

    def count_rows(world_size: int, seconds: int) -> int:
        totals = RankTotals(world_size)
        num_rows = 0
        for _ in range(2 * seconds):
            totals.add(5, 0.5, 0.1, 0.01)
            if totals.is_due:
                num_rows += 1
                assert totals.row(backend)[:2] == pytest.approx([0.09, 0.02])
            totals.advance_clock(0.5)
        return num_rows

    assert 90 <= count_rows(2, 100) <= 100
    assert count_rows(2, 86_400) < 1000
    assert count_rows(1024, 100) <= 7


def test_rank_rows_are_combined_by_column() -> None:
    """Each column lists all ranks; own times are None if the communication wait is not measured."""
    rows = [[0.1, 0.01, 1024.0], [0.2, 0.02, 2048.0]]
    row = combine_rank_rows(rows, measures_waits=True)
    assert row.own_seconds == [0.1, 0.2]
    assert row.memory_bytes == [1024, 2048]
    assert combine_rank_rows(rows, measures_waits=False).own_seconds is None


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA A100-SXM4-80GB", "bf16", False, 312),
        ("NVIDIA A100-SXM4-80GB", "fp32", True, 156),
        ("NVIDIA A100-SXM4-80GB", "fp32", False, 19.5),
        ("NVIDIA A10G", "fp16", False, 70),
        ("NVIDIA GeForce RTX 4090", "bf16", False, 165.2),
        ("NVIDIA L4", "bf16", False, 121),
        ("Tesla V100-SXM2-16GB", "bf16", False, None),
        ("Tesla V100-SXM2-16GB", "fp16", False, 125),
        ("AMD EPYC 7B13", "fp32", False, None),
        ("NVIDIA A100-SXM4-80GB", "fp64", False, None),
    ],
)
def test_peaks_are_known_by_name(name: str, precision: str, tf32: bool, tera: float | None) -> None:
    """The peak of a device follows from the driver's name for it; an unknown peak is None."""
    peak = peak_flops(name, precision, tf32=tf32)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))
    assert peak is None or math.isfinite(peak)
