"""What a run measures about itself: time, waiting, each rank's share, operations."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import flop_registry

from launcher.analysis.device_peaks import peak_flops
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.flops import CountedForward
from launcher.engine.metrics.rank_times import CommunicationClock, RankTotals, combine_rank_rows
from launcher.engine.metrics.recorder import Recorder
from launcher.environment.machine import read_machine
from launcher.errors import RunDirError
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.runs.plan_recipe import plan_recipe
from launcher.runs.rundir import RunDir


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
    rows = [[0.1, 0.01, 1024.0, 0.08], [0.2, 0.02, 2048.0, 0.07]]
    row = combine_rank_rows(rows, measures_waits=True)
    assert row.own_seconds == [0.1, 0.2]
    assert row.memory_bytes == [1024, 2048]
    assert row.device_seconds is None
    assert combine_rank_rows(rows, measures_waits=False).own_seconds is None
    timed = combine_rank_rows(rows, measures_waits=True, measures_devices=True)
    assert timed.device_seconds == [0.08, 0.07]


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
        ("Tesla V100-PCIE-32GB", "fp16", False, 112),
        ("NVIDIA L40", "bf16", False, 181),
        ("NVIDIA L40S", "bf16", False, 362),
        ("NVIDIA RTX A6000", "fp32", True, 77.4),
        ("NVIDIA GB200", "bf16", False, 2500),
        ("NVIDIA B300 SXM6 AC", "bf16", False, 2250),
        ("NVIDIA H20", "bf16", False, 148),
        ("AMD EPYC 7B13", "fp32", False, None),
        ("NVIDIA A100-SXM4-80GB", "fp64", False, None),
    ],
)
def test_peaks_are_known_by_name(name: str, precision: str, tf32: bool, tera: float | None) -> None:
    """The peak of a device follows from the driver's name for it; an unknown peak is None."""
    peak = peak_flops(name, precision, tf32=tf32)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))
    assert peak is None or math.isfinite(peak)


@pytest.mark.parametrize("is_known", [True, False])
def test_operations_are_counted_once_or_not_at_all(
    is_known: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first call is counted per sample; a formula that fails costs the count, not the run."""

    def fail(*_: object, **__: object) -> int:
        raise TypeError

    if not is_known:
        monkeypatch.setitem(flop_registry, torch.ops.aten.mm, fail)
    counts: list[float] = []
    forward = CountedForward(lambda model, batch: model @ batch, counts.append)
    model, batch = torch.ones(4, 3), torch.ones(3, 5)
    for _ in range(2):
        assert torch.equal(forward(model, batch), torch.full((4, 5), 3.0))
    assert counts == ([2 * 4 * 3 * 5 / 3] if is_known else [])


def test_files_that_cannot_be_made_are_one_error(tmp_path: Path) -> None:
    """A run folder that takes no file is an error that names the file, as for a full disk."""
    (tmp_path / "samples").touch()
    with pytest.raises(RunDirError, match=r"Cannot write .*samples"):
        Recorder(RunDir(tmp_path), 0, record_samples=True, progress=None)
