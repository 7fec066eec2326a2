"""The order of samples, and which rank takes which."""

from __future__ import annotations

import itertools
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from launcher import Recipe, make_plan, read_machine
from launcher.engine.data.order import GlobalOrder, look_up
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.sampler import EvaluationSchedule, MicroBatchRequest, Sampler
from launcher.engine.data.seeds import derive


def not_called(*_: Any) -> Any:
    raise AssertionError


@pytest.mark.parametrize("size", [1, 2, 3, 5, 255, 256, 257, 1437])
def test_it_is_a_permutation(size: int) -> None:
    """Every element is at exactly one position, in any epoch."""
    for epoch in range(3):
        elements = Permutation(size, 0, epoch)(np.arange(size))
        assert sorted(elements.tolist()) == list(range(size))


def test_it_is_the_same_on_every_machine() -> None:
    """The order depends on (seed, epoch, position) alone and never changes between versions."""
    assert Permutation(10, 0, 0)(np.arange(10)).tolist() == [9, 4, 7, 3, 5, 2, 6, 0, 8, 1]
    assert Permutation(10**9, 1, 2)(np.array([0, 1, 10**9 - 1])).tolist() == [
        801125203,
        494070523,
        617978553,
    ]


def test_all_orders_are_about_as_likely() -> None:
    """Over 4,800 seeds each of the 24 orders of four occurs; chi-square is not extreme."""
    orders = Counter(tuple(Permutation(4, seed, 0)(np.arange(4)).tolist()) for seed in range(4800))
    assert len(orders) == 24
    chi_square = sum((count - 200) ** 2 / 200 for count in orders.values())
    assert chi_square < 49.7  # the 0.999 quantile at 23 degrees of freedom


def test_neighbours_do_not_stay_together() -> None:
    """In a permutation of 10,000, positions and elements are uncorrelated."""
    elements = Permutation(10_000, 3, 0)(np.arange(10_000))
    for lag in (0, 1, 2, 64):
        others = elements[lag:] if lag else np.arange(10_000)
        assert abs(np.corrcoef(elements[: 10_000 - lag], others)[0, 1]) < 0.04


def test_ranges_can_be_looked_up_together() -> None:
    """Several ranges looked up in one call give the same elements as each by itself."""
    order = Permutation(100, 5, 1)(np.arange(100)).tolist()
    ranges = [range(3, 10), range(1), range(90, 100)]
    expected = [order[positions.start : positions.stop] for positions in ranges]
    assert look_up(GlobalOrder(100, 5), 1, ranges) == expected


def test_seeds_differ_along_a_path() -> None:
    """A derived seed depends on every element of its path and on their order."""
    seeds = {derive(0, epoch, sample) for epoch in range(50) for sample in range(50)}
    assert len(seeds) == 2500
    assert derive(7, 1, 2) == 0x4237A47555758E0F
    assert all(0 <= seed < 2**64 for seed in seeds)


HELD_OUT = (EvaluationSchedule(samples=11),)


def samplers(world_size: int, **changes: Any) -> list[Sampler]:
    """Return the sampler of each rank, for 50 samples in batches of 16."""
    fields: dict[str, Any] = {
        "name": "some",
        "model": not_called,
        "data": not_called,
        "loss": not_called,
        "batch_size": 16,
        "lr": 0.1,
        "lr_rule": "none",
        "epochs": 2,
        "train_samples": 50,
        "device": "cpu",
    }
    plan = make_plan(Recipe(**fields | changes), read_machine(), nproc_per_node=world_size)
    return [
        Sampler(plan=plan, rank=rank, train_samples=50, evaluations=HELD_OUT)
        for rank in range(world_size)
    ]


def requests_of(sampler: Sampler, step: int) -> list[MicroBatchRequest]:
    """Return the requests of one step."""
    return list(itertools.islice(sampler.requests(step), sampler.micro_steps(step)))


@pytest.mark.parametrize("world_size", [1, 3, 5, 16])
@pytest.mark.parametrize("micro_batch_size", [None, 1, 3])
@pytest.mark.parametrize("milestones", [(), (0.3, 0.7)])
def test_all_ranks_together_take_each_sample_once(
    world_size: int, micro_batch_size: int | None, milestones: tuple[float, ...]
) -> None:
    """In each step the ranks take the samples of one process, and they evaluate each once."""
    growth = {"batch_milestones": milestones, "batch_gamma": 1.5}
    single = samplers(1, **growth)[0]
    ranks = samplers(world_size, micro_batch_size=micro_batch_size, **growth)
    for step in range(single.plan.total_steps):
        requests = [requests_of(sampler, step) for sampler in ranks]
        assert len({len(own) for own in requests}) == 1, "every rank has as many micro-steps"
        assert counted_samples(requests) == requests_of(single, step)[0].indices
        assert all(request.indices for own in requests for request in own), "nothing is empty"
        for micro_step in zip(*requests, strict=True):
            with_weight = [request.has_weight for request in micro_step]
            num = micro_step[0].ranks_with_weight
            assert with_weight == [rank < (num or world_size) for rank in range(world_size)]
            assert {request.ranks_with_weight for request in micro_step} == {num}
            assert (num is None) == all(with_weight)
    evaluations = [list(sampler.evaluation()) for sampler in ranks]
    assert len({len(own) for own in evaluations}) == 1
    assert sorted(counted_samples(evaluations)) == list(range(11))


def counted_samples(requests: list[list[MicroBatchRequest]]) -> list[int]:
    """Return the samples with a weight that all ranks ask for, rank by rank."""
    return [
        index
        for own in requests
        for request in own
        if request.has_weight
        for index in request.indices
    ]


def test_the_stream_is_what_the_steps_ask_for() -> None:
    """The stream holds the requests of each step, with an evaluation after each epoch."""
    for sampler in samplers(3, micro_batch_size=2):
        expected = []
        for step in range(8):
            expected += requests_of(sampler, step)
            if step in (3, 7):
                expected += list(sampler.evaluation())
        assert list(sampler.requests()) == expected
        middle = expected.index(requests_of(sampler, 5)[0])
        assert list(sampler.requests(first_step=5)) == expected[middle:]


def test_samples_are_counted_over_epochs() -> None:
    """The number of consumed samples accounts for the short last batch of an epoch."""
    sampler = samplers(3)[0]
    assert [sampler.window(step).size for step in range(5)] == [16, 16, 16, 2, 16]
    assert [sampler.samples_before(step) for step in range(6)] == [0, 16, 32, 48, 50, 66]
    assert replace(sampler, rank=2).micro_steps(3) == 1
