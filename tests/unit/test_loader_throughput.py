"""How many workers a data set is worth, by the model."""

from __future__ import annotations

import pytest

from launcher.analysis.loader_throughput import (
    Room,
    SampleCost,
    WorkerCost,
    candidates,
    fewest,
    is_faster,
    longest_queue,
    most_workers,
    predict,
    queue_to_bridge,
    throughput,
)

ROOM = Room(cores=2.0, memory_bytes=16e9, shm_bytes=8e9)
WORKER = WorkerCost(memory_bytes=100e6, batch_bytes=1e6, prefetch_factor=2)


def cost(reading: float, reading_cpu: float, computing: float, on_cpu: float = 0.0) -> SampleCost:
    """Return what a sample costs."""
    return SampleCost(
        reading=reading, reading_cpu=reading_cpu, computing=computing, computing_cpu=on_cpu
    )


@pytest.mark.parametrize(
    ("given", "workers"),
    [
        (cost(10e-3, 0.1e-3, 1e-3), 10),  # a store that is slow: as many as its latency hides
        (cost(10e-3, 10e-3, 0.1e-3), 2),  # decoding: as many as there are cores
        (cost(15e-3, 10e-3, 0.1e-3), 2),  # the same, interrupted by another program
        (cost(1e-3, 1e-3, 4e-3), 1),  # computing takes longer than reading
        (cost(1e-9, 1e-9, 1e-3), 0),  # in memory
        (cost(1e-3, 1e-3, 1e-3, 2e-3), 1),  # computing on two threads leaves a core now and then
        (cost(1.0, 1e-3, 1e-3), 32),  # never more than that
    ],
)
def test_the_fewest_that_are_as_fast_as_any(given: SampleCost, workers: int) -> None:
    """Latency is hidden by workers beyond the cores; work is not."""
    assert predict(given, ROOM, WORKER) == workers


def test_it_stays_within_its_room() -> None:
    """Half of the free memory, and half of /dev/shm, are not exceeded."""
    slow = cost(1.0, 1e-3, 1e-3)
    little = Room(cores=2.0, memory_bytes=1e9, shm_bytes=8e9)
    assert most_workers(little, WORKER) == (5, "host memory")
    assert predict(slow, little, WORKER) == 5
    small = Room(cores=2.0, memory_bytes=16e9, shm_bytes=64e6)
    large = WorkerCost(memory_bytes=100e6, batch_bytes=10e6, prefetch_factor=2)
    assert most_workers(small, large) == (1, "/dev/shm")


def test_the_throughput_is_that_of_the_bottleneck() -> None:
    """Without workers the times add up; with them the slowest part sets the pace."""
    given = cost(10e-3, 1e-3, 2e-3, 1e-3)
    assert throughput(0, given, 2.0) == pytest.approx(1 / 12e-3)
    assert throughput(1, given, 2.0) == pytest.approx(100)
    assert throughput(4, given, 2.0) == pytest.approx(400)
    assert throughput(16, given, 2.0) == pytest.approx(500)
    assert throughput(16, given, 0.5) == pytest.approx(250)


def test_measured_numbers_decide() -> None:
    """Of those measured the fewest that are as fast as the best are taken."""
    assert fewest({0: 100.0, 2: 590.0, 4: 600.0, 8: 605.0}) == 2
    assert candidates(8, planned=1, most=32) == [1, 4, 8, 16]
    assert candidates(0, planned=4, most=2) == [0, 1, 4]


def test_a_queue_bridges_what_is_slow() -> None:
    """A worker begins early enough for its slowest batch, within the room in /dev/shm."""
    assert queue_to_bridge(0.01, workers=4, seconds_per_batch=0.01) == 1
    assert queue_to_bridge(0.4, workers=4, seconds_per_batch=0.01) == 10
    assert queue_to_bridge(0.41, workers=4, seconds_per_batch=0.01) == 11
    assert longest_queue(4, ROOM, WORKER) == 16
    assert longest_queue(4, Room(cores=2.0, memory_bytes=16e9, shm_bytes=64e6), WORKER) == 8


def test_what_scatters_is_no_faster() -> None:
    """Another setting is taken for more than that alone."""
    assert not is_faster(101.0, 100.0)
    assert is_faster(104.0, 100.0)
