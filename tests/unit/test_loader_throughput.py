"""The model that predicts the number of DataLoader workers."""

from __future__ import annotations

import pytest

from launcher.analysis.loader_throughput import (
    LoaderBudget,
    SampleCost,
    WorkerCost,
    can_gain,
    fewest_workers,
    is_contender,
    is_faster,
    max_prefetch_factor,
    max_workers,
    predict_workers,
    prefetch_factor_to_hide,
    threads_to_measure,
    throughput,
    worker_counts_to_measure,
)

BUDGET = LoaderBudget(cores=2.0, memory_bytes=16e9, shm_bytes=8e9)
LITTLE_SHM = LoaderBudget(cores=2.0, memory_bytes=16e9, shm_bytes=64e6)
WORKER = WorkerCost(memory_bytes=100e6, batch_bytes=1e6, prefetch_factor=2)


def make_cost(
    reading: float, reading_cpu: float, computing: float, computing_cpu: float = 0.0
) -> SampleCost:
    """Return the cost of a sample in seconds."""
    return SampleCost(
        reading=reading,
        reading_cpu=reading_cpu,
        computing=computing,
        computing_cpu=computing_cpu,
    )


@pytest.mark.parametrize(
    ("cost", "workers"),
    [
        (make_cost(10e-3, 0.1e-3, 1e-3), 10),  # slow storage: enough workers to hide its latency
        (make_cost(10e-3, 10e-3, 0.1e-3), 2),  # decoding: one worker per core
        (make_cost(15e-3, 10e-3, 0.1e-3), 2),  # decoding beside another program
        (make_cost(1e-3, 1e-3, 4e-3), 1),  # computing takes longer than reading
        (make_cost(1e-9, 1e-9, 1e-3), 0),  # samples in memory
        (make_cost(1e-3, 1e-3, 1e-3, 2e-3), 1),  # two computing threads leave a core now and then
        (make_cost(1.0, 1e-3, 1e-3), 32),  # the maximum
    ],
)
def test_the_prediction_is_the_fewest_workers_that_are_fast(cost: SampleCost, workers: int) -> None:
    """Workers beyond the cores hide latency but do not speed up CPU-bound reading."""
    assert predict_workers(cost, BUDGET, WORKER) == workers


def test_the_prediction_stays_within_its_budget() -> None:
    """Workers and their batches use at most half of the free memory, and half of /dev/shm."""
    slow = make_cost(1.0, 1e-3, 1e-3)
    little_memory = LoaderBudget(cores=2.0, memory_bytes=1e9, shm_bytes=8e9)
    assert max_workers(little_memory, WORKER) == (4, "host memory")
    assert predict_workers(slow, little_memory, WORKER) == 4
    large_batches = WorkerCost(memory_bytes=100e6, batch_bytes=10e6, prefetch_factor=2)
    assert max_workers(LITTLE_SHM, large_batches) == (1, "/dev/shm")


def test_the_bottleneck_limits_the_throughput() -> None:
    """Without workers the times add up; with workers the slowest resource sets the rate."""
    cost = make_cost(10e-3, 1e-3, 2e-3, 1e-3)
    assert throughput(0, cost, 2.0) == pytest.approx(1 / 12e-3)
    assert throughput(1, cost, 2.0) == pytest.approx(100)
    assert throughput(4, cost, 2.0) == pytest.approx(400)
    assert throughput(16, cost, 2.0) == pytest.approx(500)
    assert throughput(16, cost, 0.5) == pytest.approx(250)


def test_the_fewest_fast_workers_are_chosen_from_measurements() -> None:
    """The choice is the fewest measured workers within 3 % of the best throughput."""
    assert fewest_workers({0: 100.0, 2: 590.0, 4: 600.0, 8: 605.0}) == 2


def test_measurements_surround_the_prediction() -> None:
    """The planned number, the predicted one, half and twice of it are measured, up to a limit."""
    assert worker_counts_to_measure(8, planned=1, limit=32) == [1, 4, 8, 16]
    assert worker_counts_to_measure(0, planned=4, limit=2) == [0, 1, 4]


def test_a_longer_queue_hides_a_slow_batch() -> None:
    """The prefetch factor gives a worker the time of its slowest batch, within /dev/shm."""
    assert prefetch_factor_to_hide(0.01, workers=4, seconds_per_batch=0.01) == 1
    assert prefetch_factor_to_hide(0.4, workers=4, seconds_per_batch=0.01) == 10
    assert prefetch_factor_to_hide(0.41, workers=4, seconds_per_batch=0.01) == 11
    assert max_prefetch_factor(4, BUDGET, WORKER) == 16
    assert max_prefetch_factor(4, LITTLE_SHM, WORKER) == 8


def test_noise_is_not_a_speed_up() -> None:
    """A throughput counts as faster only if it is more than 3 % higher."""
    assert not is_faster(101.0, 100.0)
    assert is_faster(104.0, 100.0)


def test_stages_end_when_nothing_can_be_gained() -> None:
    """Further settings are tried while waiting exceeds noise, and close rates are repeated."""
    assert not can_gain(wait_seconds=0.02, step_seconds=1.0)
    assert can_gain(wait_seconds=0.04, step_seconds=1.0)
    assert is_contender(90.0, best=100.0)
    assert not is_contender(85.0, best=100.0)


@pytest.mark.parametrize(
    ("workers", "samples", "choices"),
    [
        (0, 16, [(0, 2), (1, 2)]),
        (3, 16, [(0, 3), (2, 2)]),
        (16, 64, [(0, 16), (4, 4)]),
        (16, 2, [(0, 2), (4, 2)]),
        (16, 1, []),
    ],
)
def test_threads_stand_for_workers(
    workers: int, samples: int, choices: list[tuple[int, int]]
) -> None:
    """Threads in the rank, and in fewer workers, read as many samples at a time as workers do."""
    assert threads_to_measure(workers, samples) == choices
