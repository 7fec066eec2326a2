"""What a run measures of itself: time, waiting, each rank's part, operations."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
from support import ROOT, Commands, read_lines

from launcher.analysis.device_peaks import peak_flops
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.rank_times import CommunicationClock, OwnShare, by_rank
from launcher.environment.machine import read_machine
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.runs.history import History
from launcher.runs.job import plan_recipe
from launcher.runs.rundir import RunDir, read_rows

STRAGGLING = ROOT / "tests/recipes/straggling.py"


def rows_of(run_dir: Path) -> list[dict[str, Any]]:
    """Return the rows of steps."""
    return [row for row in read_lines(run_dir / "metrics.jsonl") if "grad_norm" in row]


@pytest.fixture(scope="module")
def runs(module_run: Commands) -> Path:
    """Train with one rank that pauses, under DDP and FSDP, and alone."""
    for name, arguments in {
        "ddp": (STRAGGLING, "-n", "2"),
        "fsdp": ("digits", "-n", "2", "strategy=fsdp"),
        "alone": ("digits", "-n", "1"),
    }.items():
        done = module_run("launcher", "run", *arguments, "steps=60", "--out", name)
        assert done.exit_code == 0, done.stderr
    return module_run.folder


def test_steps_have_a_time(runs: Path) -> None:
    """By rank 0's clock, each after the one before, as far apart as a step takes."""
    rows = rows_of(runs / "ddp")
    times = [row["time"] for row in rows]
    assert times == sorted(times)
    events = read_lines(runs / "ddp/events.jsonl")
    assert events[0]["time"] < times[0] < times[-1] < events[-1]["time"]
    assert all(row["step_seconds"] > 0 for row in rows)
    taken = sum(row["step_seconds"] for row in rows[1:])
    assert taken <= times[-1] - times[0] + 0.01, "evaluations are not steps"


def test_the_momentum_used_is_written(runs: Path) -> None:
    """1cycle takes it down while the learning rate goes up."""
    rows = rows_of(runs / "alone")
    peak = max(rows, key=lambda row: row["lr"])
    assert peak["momentum"] == pytest.approx(0.85)
    assert rows[-1]["momentum"] == pytest.approx(0.95)


def test_waiting_for_others_is_measured(runs: Path) -> None:
    """Under DDP: one rank waits about as long as the other pauses, and each knows its own part."""
    rows = rows_of(runs / "ddp")[10:]
    waited = sum(row["communication_seconds"] for row in rows) / len(rows)
    assert waited > 0.005, "20 ms on one of two ranks is 10 on average"
    ranks = [row["ranks"] for row in read_lines(runs / "ddp/metrics.jsonl") if "ranks" in row][-1]
    zero, one = ranks["own_seconds"]
    assert one > zero + 0.01
    assert all(each > 2**20 for each in ranks["memory_bytes"])
    assert len(ranks["data_wait_seconds"]) == 2


def test_what_is_not_known_is_not_written(runs: Path) -> None:
    """Alone there is nobody to wait for; under FSDP nobody can tell."""
    assert {row["communication_seconds"] for row in rows_of(runs / "alone")} == {0.0}
    assert {row["communication_seconds"] for row in rows_of(runs / "fsdp")} == {None}
    ranks = [row["ranks"] for row in read_lines(runs / "fsdp/metrics.jsonl") if "ranks" in row][-1]
    assert ranks["own_seconds"] is None
    assert len(ranks["memory_bytes"]) == 2


def test_operations_are_counted(runs: Path) -> None:
    """Two for each multiplication of the net's convolutions and products, under all strategies."""
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


def test_a_history_goes_on_where_it_was(runs: Path, tmp_path: Path) -> None:
    """A line that is still being written is left for the next look; one that is damaged is left."""
    copy = RunDir(tmp_path)
    whole = (runs / "alone/metrics.jsonl").read_bytes()
    (tmp_path / "run.yaml").write_bytes((runs / "alone/run.yaml").read_bytes())
    lines = whole.splitlines(keepends=True)
    copy.metrics.write_bytes(lines[0] + lines[1][:20])
    history = History(copy)
    assert list(history.steps["step"]) == [1]
    with copy.metrics.open("ab") as file:
        file.write(lines[1][20:] + b"{damaged\n" + b"".join(lines[2:]))
    history.refresh()
    expected = [row["step"] for row in rows_of(runs / "alone")]
    assert list(history.steps["step"]) == expected
    copy.metrics.write_bytes(b"".join(lines[:5]))  # as a run does that goes back to a checkpoint
    history.refresh()
    assert history.last_step <= 5
    assert [row["step"] for row in read_rows(copy.metrics)] == [
        row["step"] for row in read_lines(copy.metrics)
    ]


def test_the_clock_takes_differences() -> None:
    """Of totals; where nothing was timed since, what was known before stays."""
    totals: list[tuple[float, int] | None] = [(1.0, 10), (1.0, 10), (4.0, 20), None]
    clock = CommunicationClock(lambda: totals.pop(0))
    assert [clock.per_step() for _ in range(4)] == [
        pytest.approx(0.1),
        pytest.approx(0.1),
        pytest.approx(0.3),
        None,
    ]


def test_ranks_tell_each_other_less_often_with_time() -> None:
    """After a second, then after a hundredth of the time; with many ranks less often than that."""
    _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=1)
    backend = LocalBackend(digits(), plan)

    def written(world_size: int, seconds: int) -> int:
        share = OwnShare(world_size)
        count = 0
        for _ in range(2 * seconds):
            share.add(5, 0.5, 0.1, 0.01)
            if share.is_due:
                count += 1
                assert share.row(backend)[:2] == pytest.approx([0.09, 0.02])
            share.pass_by(0.5)
        return count

    assert 90 <= written(2, 100) <= 100
    assert written(2, 86_400) < 1000
    assert written(1024, 100) <= 7


def test_lines_of_ranks_become_columns() -> None:
    """Where a rank cannot tell what it waits for, its own part is not known."""
    rows = [[0.1, 0.01, 1024.0], [0.2, 0.02, 2048.0]]
    row = by_rank(rows, tells=True)
    assert row.own_seconds == [0.1, 0.2]
    assert row.memory_bytes == [1024, 2048]
    assert by_rank(rows, tells=False).own_seconds is None


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
    """As the driver gives it; what is not known is not guessed."""
    peak = peak_flops(name, precision, tf32=tf32)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))
    assert peak is None or math.isfinite(peak)
