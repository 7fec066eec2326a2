"""Groups of ranks that share weights under FSDP: their forms, their messages, what is refused."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
from examples import LAPTOP, NODE, recipe

from launcher import PlanError, RecipeError, make_plan
from launcher.analysis.scaling_model import Link, Network, traffic
from launcher.console.explain import explain
from launcher.planning.configs import accelerate_config
from launcher.planning.fsdp_messages import StepCollectives, collectives_for
from launcher.planning.sharding import Sent, Sharding, sharding_for

WORLDS = [(nodes, nproc) for nodes in (1, 2, 3, 4, 6) for nproc in (1, 2, 3, 4, 8)]


def shardings() -> Iterator[Sharding]:
    """Yield every possible sharding of some worlds."""
    for nodes, nproc in WORLDS:
        for size in range(2, nodes * nproc + 1):
            if nproc % size == 0 or (size % nproc == 0 and nodes % (size // nproc) == 0):
                yield Sharding(nodes=nodes, nproc_per_node=nproc, size=size)


def sent_by_rings(sharding: Sharding, rings: list[range], each: float) -> Sent:
    """Return what is sent if each rank of each ring sends `each` to the next one."""
    nproc, inside, between = sharding.nproc_per_node, 0.0, 0.0
    for ring in rings:
        for rank, following in zip(ring, [*ring[1:], ring[0]], strict=True):
            if rank // nproc == following // nproc:
                inside += each
            else:
                between += each
    return Sent(inside / sharding.world_size, between / sharding.nodes)


def test_amounts_are_those_of_rings() -> None:
    """What ranks and nodes send equals the sum over the edges of rings through the ranks."""
    for sharding in shardings():
        size, copies, world_size = sharding.size, sharding.copies, sharding.world_size
        groups = [range(first, first + size) for first in range(0, world_size, size)]
        expected = sent_by_rings(sharding, groups, (size - 1) / size)
        assert sharding.gathered() == pytest.approx(expected)
        same = [range(first, world_size, size) for first in range(size)]
        expected = sent_by_rings(sharding, same, 2 * (copies - 1) / copies / size)
        assert sharding.summed_over_copies() == pytest.approx(expected)


def test_groups_stay_inside_nodes_unless_asked_otherwise() -> None:
    """shard= names a node, all ranks or a number of them; the default is a node."""

    def size(nodes: int, nproc: int, **changes: Any) -> int:
        sharding = sharding_for(recipe(strategy="fsdp", **changes), nodes, nproc)
        assert sharding is not None
        return sharding.size

    assert [size(1, 8), size(2, 8), size(4, 2), size(4, 1)] == [8, 8, 2, 4]
    assert size(2, 8, shard="all") == 16
    assert [size(4, 8, shard=number) for number in (2, 4, 8, 16, 32)] == [2, 4, 8, 16, 32]
    assert sharding_for(recipe(strategy="zero3"), 2, 8) is None


@pytest.mark.parametrize(
    ("shard", "nodes", "nproc", "problem", "use"),
    [
        (3, 1, 4, "does not divide", "2, 4"),
        (8, 1, 4, "does not divide", "2, 4"),
        (6, 3, 4, "neither a part of the 4 ranks", "2, 4, 12"),
        (8, 3, 4, "does not divide", "2, 4, 12"),
        (1, 1, 4, "strategy=ddp", "2 or more"),
    ],
)
def test_groups_that_cannot_be_formed_are_refused(
    shard: int, nodes: int, nproc: int, problem: str, use: str
) -> None:
    """A refusal names the ranks, what is wrong, and the numbers to use."""
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(strategy="fsdp", shard=shard), LAPTOP, nodes=nodes, nproc_per_node=nproc)
    message = str(caught.value)
    assert f"shard={shard}" in message
    assert problem in message
    assert use in message


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"shard": 2}, "shard=2"),
        ({"strategy": "zero3", "shard": "all"}, "shard=all"),
        ({"reshard_after_forward": False}, "reshard_after_forward=false"),
        ({"strategy": "zero2", "accumulate_unsharded": True}, "accumulate_unsharded=true"),
        ({"prefetch_blocks": 1}, "prefetch_blocks=1"),
        ({"reduce_dtype": "bf16"}, "reduce_dtype=bf16"),
        ({"strategy": "fsdp", "reduce_dtype": "bf16", "precision": "fp64"}, "precision=fp64"),
        ({"strategy": "fsdp", "reduce_dtype": "bf16", "accumulate_unsharded": True}, "micro-steps"),
        ({"strategy": "fsdp", "noise_scale": True, "accumulate_unsharded": True}, "noise_scale"),
        (
            {"strategy": "fsdp", "reduce_dtype": "bf16", "exact": True, "virtual_ranks": 8},
            "exact=true",
        ),
        (
            {"strategy": "fsdp", "accumulate_unsharded": True, "exact": True, "virtual_ranks": 8},
            "exact=true",
        ),
    ],
)
def test_settings_of_fsdp_that_cannot_hold_are_refused(changes: dict[str, Any], named: str) -> None:
    """Settings of FSDP are refused under other strategies, and where they contradict another."""
    with pytest.raises(PlanError, match=named):
        make_plan(recipe(**changes), LAPTOP, nproc_per_node=4)


def test_shard_takes_two_words_and_numbers() -> None:
    """Other values of shard= are refused by the recipe."""
    for shard in ("rack", 0, -2, 1.5):
        with pytest.raises(RecipeError, match="shard"):
            recipe(strategy="fsdp", shard=shard)


def test_a_plan_shows_groups_and_messages() -> None:
    """The plan names the ranks that share weights and hold copies, and what a step sends."""
    plan = make_plan(recipe(strategy="fsdp"), NODE, nodes=2)
    assert (plan.shard_size, plan.shards, plan.world_size) == (8, 8, 16)
    assert type(plan).from_dict(plan.to_dict()) == plan
    text = " ".join(explain(plan).split())
    assert "in 8 shards and 2 copies" in text
    assert "ranks 0-7, ranks 8-15 each share all weights" in text
    assert "ranks 0, 8 hold the same shard" in text
    # 3 x 7/8 in the node, and 2 x 1/2 between the nodes
    assert "each rank sends up to 2.62 x the weights inside its node, and each node 1 x" in text
    everywhere = " ".join(
        explain(make_plan(recipe(strategy="fsdp", shard="all"), NODE, nodes=2)).split()
    )
    # 3 x 15/16 over each edge, of which two in 16 cross
    assert (
        "each rank sends up to 2.46 x the weights inside its node, and each node 2.81 x"
        in everywhere
    )
    assert "shards " not in explain(make_plan(recipe(), NODE, nodes=2))


def test_collectives_follow_the_settings() -> None:
    """Settings of FSDP change how often weights are gathered and gradients reduced and summed."""

    def collectives(**changes: Any) -> StepCollectives:
        return collectives_for(recipe(strategy="fsdp", **changes).settings(), 4, 1)

    default = StepCollectives(gathers=8, outside=4, reductions=4, sums=1)
    assert collectives() == default
    assert collectives(reshard_after_forward=False) == replace(default, gathers=4)
    assert collectives(accumulate_unsharded=True) == replace(default, reductions=1)
    assert collectives(reduce_dtype="bf16") == replace(default, sums=4, reduced_size=0.5)
    assert collectives(noise_scale=True) == replace(default, sums=4)
    assert collectives(precision="bf16") == replace(default, gathered_size=0.5)
    exact = collectives(exact=True, virtual_ranks=8)
    assert exact == replace(default, reductions=1, sums=1.5)


def test_groups_inside_nodes_spare_slow_links() -> None:
    """The estimated time of a step's collectives is shorter with groups inside nodes."""
    network = Network(
        inside=Link(seconds=1e-6, bytes_per_second=4e11),
        between=Link(seconds=1e-5, bytes_per_second=2.5e10),
    )

    def seconds(size: int) -> float:
        return traffic(
            4e9,
            4,
            8,
            network,
            strategy="fsdp",
            accumulation=2,
            sharding=Sharding(nodes=4, nproc_per_node=8, size=size),
            collectives=StepCollectives(gathers=4, outside=2, reductions=2, sums=1),
        ).seconds

    everywhere = traffic(4e9, 4, 8, network, strategy="fsdp", accumulation=2).seconds
    assert seconds(32) == pytest.approx(everywhere)
    # Six passes over the link of a node, of 3/4 of the weights each, against one sum of 2 x 3/4.
    assert everywhere / seconds(8) == pytest.approx(3, rel=0.3)
    assert seconds(8) < seconds(16) < seconds(32)


def test_accelerate_gets_the_groups() -> None:
    """The exported configuration of Accelerate has the groups and the resharding of the plan."""
    settings = recipe(strategy="fsdp", reshard_after_forward=False)
    config = accelerate_config(settings, make_plan(settings, NODE, nodes=2))
    assert config["fsdp_config"]["fsdp_reshard_after_forward"] is False
    assert config["parallelism_config"] == {
        "parallelism_config_dp_replicate_size": 2,
        "parallelism_config_dp_shard_size": 8,
    }
    assert "parallelism_config" not in accelerate_config(settings, make_plan(settings, NODE))
