"""The samples of virtual ranks, which do not depend on the number of ranks."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from examples import LAPTOP, recipe

from launcher import make_plan
from launcher.engine.data.sampler import EvaluationSchedule, MicroBatchRequest, Sampler
from launcher.planning.global_batch import Statistics

TRAINED, EVALUATED = 50, 27
SCHEDULES = (EvaluationSchedule(samples=EVALUATED),)


def samplers(
    world_size: int, *, statistics: Statistics = "none", exact: bool = False, **changes: Any
) -> list[Sampler]:
    """Return the sampler of each rank, for 50 samples in batches of 16, of which the last is 2."""
    fields: dict[str, Any] = {
        "batch_size": 16,
        "lr_rule": "none",
        "epochs": 2,
        "train_samples": TRAINED,
        "virtual_ranks": 8,
        "exact": exact,
        "strategy": "fsdp" if exact else "ddp",
    }
    plan = make_plan(recipe(**fields | changes), LAPTOP, nproc_per_node=world_size)
    return [
        Sampler(
            plan=plan,
            rank=rank,
            train_samples=TRAINED,
            evaluations=SCHEDULES,
            statistics=statistics,
        )
        for rank in range(world_size)
    ]


def requests_of(sampler: Sampler, step: int) -> list[MicroBatchRequest]:
    """Return the requests of one step."""
    return list(itertools.islice(sampler.requests(step), sampler.micro_steps(step)))


Work = dict[tuple[int, int], tuple[list[int], bool, bool, bool, bool]]
"""What a virtual rank computes in each micro-step: samples, whether they have a weight, whether
BatchNorm sees one, and whether it is the last micro-batch or an empty part."""


def work_of_virtual_ranks(requests: list[list[MicroBatchRequest]]) -> Work:
    """Return the work of all virtual ranks, by virtual rank and micro-step.

    Args:
        requests: The requests of each rank.
    """
    work: Work = {}
    for own in requests:
        for request in own:
            part = request.part
            assert part is not None
            if part.virtual_rank is None:
                assert not request.has_weight
                assert request.indices, "a padded micro-batch has samples to run on"
                continue
            key = (part.virtual_rank, part.micro_step)
            assert key not in work
            work[key] = (
                request.indices,
                request.has_weight,
                request.single_sample,
                part.is_last,
                part.is_empty,
            )
    return work


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("statistics", ["none", "rank"])
@pytest.mark.parametrize(
    "changes",
    [{}, {"micro_batch_size": 1}, {"batch_milestones": (0.5,), "batch_gamma": 1.5}],
    ids=["plain", "split", "growing"],
)
def test_virtual_ranks_take_the_same_samples(
    changes: dict[str, Any], statistics: Statistics, exact: bool
) -> None:
    """On any number of ranks each position is taken once, and by the same virtual rank."""
    single = samplers(1, statistics=statistics, **changes)[0]
    for world_size in range(2, 9):
        ranks = samplers(world_size, statistics=statistics, exact=exact, **changes)
        for step in range(single.plan.total_steps):
            requests = [requests_of(sampler, step) for sampler in ranks]
            assert len({len(own) for own in requests}) == 1, "every rank has as many micro-steps"
            assert {request.ranks_with_weight for own in requests for request in own} == {None}
            work = work_of_virtual_ranks(requests)
            assert work == work_of_virtual_ranks([requests_of(single, step)])
            taken = [
                index
                for _, (indices, has_weight, *_) in sorted(work.items())
                if has_weight
                for index in indices
            ]
            assert taken == single.batch_ids(step)


def test_ranks_with_fewer_virtual_ranks_are_padded_at_the_end() -> None:
    """Eight virtual ranks on three ranks are 3, 3 and 2, and the third has one without work."""
    for exact, of_ranks in (
        (False, [[0, 1, 2], [3, 4, 5], [6, 7, None]]),
        (True, [[0, 3, 6], [1, 4, 7], [2, 5, None]]),
    ):
        ranks = samplers(3, exact=exact)
        assert [
            [request.part.virtual_rank for request in requests_of(sampler, 0) if request.part]
            for sampler in ranks
        ] == of_ranks


def test_parts_of_a_short_batch_are_empty() -> None:
    """In a last batch of 2 samples, two virtual ranks have one each and six are empty."""
    for sampler in samplers(1, micro_batch_size=1):
        requests = requests_of(sampler, 3)
        parts = [request.part for request in requests]
        assert [part.is_empty for part in parts if part] == [False] * 2 + [True] * 6
        assert [request.has_weight for request in requests] == [True] * 2 + [False] * 6
        assert all(len(request.indices) == 2 for request in requests[2:]), "BatchNorm needs two"
        assert all(part.is_last for part in parts if part)


def test_only_the_last_micro_batch_ends_a_part() -> None:
    """Of the two micro-batches of a virtual rank, the second is the last one."""
    requests = requests_of(samplers(2, micro_batch_size=1)[1], 0)
    parts = [request.part for request in requests if request.part]
    assert [part[:3] for part in parts] == [
        (virtual_rank, micro_step, micro_step == 1)
        for virtual_rank in range(4, 8)
        for micro_step in range(2)
    ]


def test_evaluations_visit_each_sample_once() -> None:
    """Each sample is evaluated once, by the same virtual rank on any number of ranks."""
    expected: list[list[int]] | None = None
    for world_size in range(1, 9):
        ranks = samplers(world_size)
        requests = [list(sampler.evaluation()) for sampler in ranks]
        assert {len(own) for own in requests} == {ranks[0].evaluation_steps(SCHEDULES[0])}
        by_virtual_rank: list[list[int]] = [[] for _ in range(8)]
        for own in requests:
            for request in own:
                assert request.part is not None
                assert request.indices
                if request.has_weight:
                    assert request.part.virtual_rank is not None
                    by_virtual_rank[request.part.virtual_rank] += request.indices
        assert sorted(index for own in by_virtual_rank for index in own) == [*range(EVALUATED)]
        expected = expected or by_virtual_rank
        assert by_virtual_rank == expected


def test_without_virtual_ranks_there_are_no_parts() -> None:
    """Requests of a recipe without virtual ranks belong to no part."""
    for sampler in samplers(3, virtual_ranks=None):
        assert all(request.part is None for request in requests_of(sampler, 0))
        assert all(request.part is None for request in sampler.evaluation())
