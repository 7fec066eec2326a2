"""Virtual ranks: the tree in whose order gradients are summed, and what a plan says and refuses."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from typing import Any

import pytest
from examples import LAPTOP, NODE, recipe
from hypothesis import given, settings
from hypothesis import strategies as st

from launcher import Plan, PlanError, make_plan
from launcher.console.explain import explain
from launcher.planning.single_sample_batches import batch_norm_refusal
from launcher.planning.virtual_ranks import Node, TreeSum, VirtualRanks

MOST = 40


def distributions(*, interleaved: bool) -> Iterator[VirtualRanks]:
    """Yield every distribution of up to `MOST` virtual ranks."""
    for count in range(1, MOST + 1):
        for world_size in range(1, count + 1):
            yield VirtualRanks(count=count, world_size=world_size, interleaved=interleaved)


def expression(start: int, stop: int) -> str:
    """Return the sum over some leaves as text, split after the largest power of two below."""
    if stop - start == 1:
        return str(start)
    half = 1
    while 2 * half < stop - start:
        half *= 2
    middle = start + half
    return f"({expression(start, middle)}+{expression(middle, stop)})"


def add(left: str, right: str) -> str:
    """Return a sum as text."""
    return f"({left}+{right})"


def summed(tree: TreeSum[str], leaves: range) -> int:
    """Add leaves to a tree; return the largest number of sums that it held, the new one included.

    Args:
        tree: The tree.
        leaves: The virtual ranks, in order.
    """
    deepest = 0
    for leaf in leaves:
        deepest = max(deepest, len(tree.pending) + 1)
        tree.push(leaf, str(leaf))
    return deepest


def test_partial_sums_of_contiguous_ranks_give_the_tree() -> None:
    """The nodes that ranks sum by themselves add up to the whole tree, for any number of ranks."""
    for distribution in distributions(interleaved=False):
        count, whole, deepest = distribution.count, TreeSum(distribution.count, add), 0
        for rank in range(distribution.world_size):
            own = TreeSum(count, add)
            deepest = max(deepest, summed(own, distribution.of_rank(rank)))
            nodes = distribution.nodes_of_rank(rank)
            assert [node for node, _ in own.pending] == nodes
            leaves = [leaf for node in nodes for leaf in range(*node)]
            assert leaves == list(distribution.of_rank(rank))
            for node, value in own.pending:
                assert value == expression(*node)
                whole.push_node(node, value)
        assert whole.take() == expression(0, count)
        assert whole.pending == []
        assert distribution.most_copies() == deepest


def test_rounds_of_interleaved_ranks_give_the_tree() -> None:
    """Rounds of neighbouring virtual ranks, added in rank order, give the same tree."""
    for distribution in distributions(interleaved=True):
        count, world_size = distribution.count, distribution.world_size
        tree, most_between_rounds = TreeSum(count, add), 0
        for number in range(distribution.rounds):
            in_round = distribution.of_round(number)
            for rank in range(world_size):
                own = distribution.of_rank(rank)
                computed = own[number] if number < len(own) else None
                assert computed == (in_round[rank] if rank < len(in_round) else None)
            summed(tree, in_round)
            assert tree.end == in_round.stop
            if number < distribution.rounds - 1:
                most_between_rounds = max(most_between_rounds, len(tree.pending))
        assert tree.take() == expression(0, count)
        assert distribution.most_copies() == 1 + most_between_rounds


def test_groups_of_interleaved_ranks_give_the_tree() -> None:
    """Each group sums the nodes of its range in rounds, and the groups' nodes add up to the tree.

    The ranks share all virtual ranks in as many rounds as without groups.
    """
    for count in range(1, MOST + 1):
        for size, groups in itertools.product(range(1, 7), range(1, 7)):
            if size * groups > count:
                continue
            distribution = VirtualRanks(
                count=count, world_size=size * groups, interleaved=True, groups=groups
            )
            whole, most = TreeSum(count, add), 0
            computed: list[int] = []
            for group in range(groups):
                own = TreeSum(count, add)
                for number in range(distribution.rounds):
                    in_round = distribution.of_round(number, group)
                    for index in range(size):
                        of_rank = distribution.of_rank(group * size + index)
                        assert list(of_rank[number : number + 1]) == list(
                            in_round[index : index + 1]
                        )
                    summed(own, in_round)
                    most = max(most, len(own.pending))
                    computed += in_round
                assert [node for node, _ in own.pending] == distribution.nodes_of_group(group)
                for node, value in own.pending:
                    whole.push_node(node, value)
            assert whole.take() == expression(0, count)
            assert computed == list(range(count))
            assert groups == 1 or distribution.most_copies() == 1 + most


def test_no_rank_has_one_more_virtual_rank_than_rounds() -> None:
    """The ranks share all virtual ranks, and each has as many as there are rounds, or one less."""
    for is_interleaved in (False, True):
        for distribution in distributions(interleaved=is_interleaved):
            shares = [distribution.of_rank(rank) for rank in range(distribution.world_size)]
            assert sorted(leaf for share in shares for leaf in share) == [
                *range(distribution.count)
            ]
            assert {len(share) for share in shares} <= {
                distribution.rounds - 1,
                distribution.rounds,
            }


def test_whole_subtrees_take_one_copy_for_each_level() -> None:
    """Ranks whose ranges are whole subtrees exchange one node each."""
    for world_size in (1, 2, 4, 8):
        distribution = VirtualRanks(count=8, world_size=world_size)
        size = 8 // world_size
        nodes = [distribution.nodes_of_rank(rank) for rank in range(world_size)]
        assert nodes == [[Node(rank * size, (rank + 1) * size)] for rank in range(world_size)]
        assert distribution.most_copies() == size.bit_length()


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1, max_size=40),
    st.integers(1, 40),
)
def test_sums_of_numbers_do_not_depend_on_the_ranks(values: list[float], world_size: int) -> None:
    """The sum of any floating-point numbers has the same bits on any number of ranks."""
    count = len(values)
    sums = []
    for ranks in (1, min(world_size, count)):
        whole: TreeSum[float] = TreeSum(count, float.__add__)
        distribution = VirtualRanks(count=count, world_size=ranks)
        for rank in range(ranks):
            own: TreeSum[float] = TreeSum(count, float.__add__)
            for leaf in distribution.of_rank(rank):
                own.push(leaf, values[leaf])
            for node, value in own.pending:
                whole.push_node(node, value)
        sums.append(whole.take().hex())
    assert sums[0] == sums[1]


@pytest.mark.parametrize(
    ("changes", "ranks", "arithmetic", "samples", "micro_steps"),
    [
        ({}, 3, "256 = 8 virtual ranks x 32 samples; on 3 CPU ranks 3 + 3 + 2", (96, 96, 64), 3),
        (
            {"micro_batch_size": 16},
            1,
            "256 = 8 virtual ranks x 32 samples, in 2 micro-batches each; on 1 CPU rank 8",
            (256,),
            16,
        ),
        (
            {"virtual_ranks": 3},
            2,
            "256 over 3 virtual ranks x 85 or 86 samples; on 2 CPU ranks 2 + 1",
            (171, 85),
            2,
        ),
        (
            {"virtual_ranks": 10, "batch_size": 20, "lr_batch_size": 20},
            9,
            "20 = 10 virtual ranks x 2 samples; on 9 CPU ranks 2 + 1 + 1 + 1 + 1 + 1 + 1 + 1 + ...",
            (4, *[2] * 8),
            2,
        ),
    ],
)
def test_a_plan_shows_the_division(
    changes: dict[str, Any],
    ranks: int,
    arithmetic: str,
    samples: tuple[int, ...],
    micro_steps: int,
) -> None:
    """A plan divides a batch into virtual ranks, and these into ranks, and shows the arithmetic."""
    plan = make_plan(recipe(**{"virtual_ranks": 8} | changes), LAPTOP, nproc_per_node=ranks)
    assert plan.derivations["batch_size"] == arithmetic
    assert plan.samples_per_rank == samples
    assert plan.accumulation_steps == micro_steps


def test_a_micro_batch_does_not_depend_on_the_ranks() -> None:
    """The size of a micro-batch is that of a virtual rank on any number of ranks."""
    sizes = {
        make_plan(recipe(virtual_ranks=7), LAPTOP, nproc_per_node=ranks).micro_batch_size
        for ranks in range(1, 8)
    }
    assert sizes == {37}


def test_a_plan_shows_what_is_equal() -> None:
    """The notes say what virtual ranks and exact sums make equal, and how many copies they hold."""
    text = " ".join(explain(make_plan(recipe(virtual_ranks=8), LAPTOP, nproc_per_node=2)).split())
    assert "virtual_ranks=8" in text
    assert "exact=true" not in text
    for strategy, copies in (("ddp", "3 copies of the"), ("fsdp", "3 copies of its shard")):
        exact = recipe(virtual_ranks=8, exact=True, strategy=strategy)
        text = " ".join(explain(make_plan(exact, LAPTOP, nproc_per_node=2)).split())
        assert "equal to the bit on 1 to 8 ranks" in text
        assert copies in text


@pytest.mark.parametrize(
    ("changes", "ranks", "numbers"),
    [
        ({"virtual_ranks": 4}, 5, ["virtual_ranks=4", "-n 4", "virtual_ranks=5"]),
        (
            {"virtual_ranks": 300},
            2,
            ["batch_size=256", "virtual_ranks=256 or less", "batch_size=300 or more"],
        ),
        (
            {"virtual_ranks": 100, "batch_milestones": (0.5,), "batch_gamma": 0.25},
            2,
            ["batch_size=64", "virtual_ranks=64 or less"],
        ),
        ({"virtual_ranks": 4, "sync_batchnorm": True}, 2, ["sync_batchnorm=true"]),
        ({"virtual_ranks": 4, "rank_buffers": "average"}, 1, ["rank_buffers=average"]),
        (
            {
                "virtual_ranks": 4,
                "batch_size": None,
                "batch_size_per_gpu": 2,
                "lr_rule": "none",
            },
            1,
            ["batch_size_per_gpu=2", "Use batch_size."],
        ),
        ({"exact": True}, 2, ["virtual_ranks=8"]),
        ({"exact": True, "virtual_ranks": 4, "strategy": "zero1"}, 2, ["strategy=zero1"]),
        ({"exact": True, "virtual_ranks": 4, "strategy": "zero2"}, 2, ["strategy=zero2"]),
        ({"exact": True, "virtual_ranks": 4, "strategy": "zero3"}, 1, ["strategy=zero3"]),
        ({"exact": True, "virtual_ranks": 4, "cudnn_benchmark": True}, 2, ["cudnn_benchmark=true"]),
    ],
)
def test_contradictions_are_refused(
    changes: dict[str, Any], ranks: int, numbers: list[str]
) -> None:
    """Settings that contradict virtual ranks are refused by name, with the number to use."""
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(**changes), LAPTOP, nproc_per_node=ranks)
    for number in numbers:
        assert number in str(caught.value)


def test_as_many_ranks_as_virtual_ranks_are_planned() -> None:
    """The largest number of ranks, and the smallest batch, are accepted."""
    plan = make_plan(
        recipe(virtual_ranks=8, batch_size=8, lr_batch_size=8), LAPTOP, nproc_per_node=8
    )
    assert plan.samples_per_rank == (1,) * 8
    assert (plan.accumulation_steps, plan.micro_batch_size) == (1, 1)


def test_exact_runs_on_cpus_have_one_thread() -> None:
    """Each rank of an exact run has one thread where CPUs compute, on any number of ranks."""
    exact = {"virtual_ranks": 8, "exact": True}
    for ranks in (1, 2, 8):
        assert make_plan(recipe(**exact), LAPTOP, nproc_per_node=ranks).threads_per_rank == 1
        offloaded = recipe(**exact, strategy="fsdp", offload="cpu")
        assert make_plan(offloaded, NODE, nproc_per_node=max(ranks, 2)).threads_per_rank == 1
    assert make_plan(recipe(**exact), NODE, nproc_per_node=2).threads_per_rank == 32
    assert make_plan(recipe(virtual_ranks=8), LAPTOP, nproc_per_node=2).threads_per_rank == 4


def test_plans_survive_a_file() -> None:
    """A plan with virtual ranks is read as it was written; a plan of before has none."""
    plan = make_plan(recipe(virtual_ranks=8, exact=True, strategy="fsdp"), LAPTOP, nproc_per_node=3)
    read = Plan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert read == plan
    assert read.distribution == VirtualRanks(count=8, world_size=3, interleaved=True)
    old = make_plan(recipe(), LAPTOP, nproc_per_node=2).to_dict()
    for name in ("virtual_ranks", "exact"):
        del old[name], old["settings"][name]
    read = Plan.from_dict(old)
    assert (read.virtual_ranks, read.exact) == (None, False)
    assert read.distribution == VirtualRanks(count=2, world_size=2)
    assert read.cut("none").world_size == 2


def test_ranks_must_agree_on_virtual_ranks() -> None:
    """Plans with other virtual ranks, or with and without exact sums, differ for the ranks."""
    plain, virtual, exact = (
        make_plan(recipe(**changes), LAPTOP, nproc_per_node=2)
        for changes in ({}, {"virtual_ranks": 2}, {"virtual_ranks": 2, "exact": True})
    )
    assert "virtual_ranks" in plain.differences(virtual.agreement())
    assert "exact" in virtual.differences(exact.agreement())


def test_a_refusal_of_single_samples_names_virtual_ranks() -> None:
    """A virtual rank of one sample, for BatchNorm, is refused with settings that can be used."""
    small = recipe(virtual_ranks=8, batch_size=8, lr_batch_size=8)
    for ranks in (1, 8):
        text = batch_norm_refusal(make_plan(small, LAPTOP, nproc_per_node=ranks), [8], "norm")
        assert "8 virtual ranks" in text
        assert "sync_batchnorm" not in text
        assert "fewer ranks" not in text
