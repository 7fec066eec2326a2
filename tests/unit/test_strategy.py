"""Strategies and the settings for speed: what a plan says of them, and what it refuses."""

from __future__ import annotations

import ast
from dataclasses import fields, replace
from typing import Any

import pytest
from examples import LAPTOP, NODE, recipe
from support import ROOT

from launcher import PlanError, Recipe, RecipeError, make_plan
from launcher.console.explain import explain
from launcher.planning.strategy import STRATEGIES


def text(machine: Any, ranks: int, **changes: Any) -> str:
    """Return a plan in words, on one line."""
    plan = make_plan(recipe(**changes), machine, nproc_per_node=ranks)
    return " ".join(explain(plan).split())


def test_every_strategy_is_a_setting_and_the_other_way_round() -> None:
    """What Recipe takes is what there is."""
    for name in STRATEGIES:
        assert recipe(strategy=name).strategy == name
    with pytest.raises(RecipeError, match="expected ddp or fsdp or zero1 or zero2 or zero3"):
        recipe(strategy="zero4")


PROPERTIES = {
    "ddp": set(),
    "zero1": {"shards_optimizer_state"},
    "zero2": {"shards_optimizer_state", "shards_gradients"},
    "zero3": {"shards_optimizer_state", "shards_gradients", "shards_parameters"},
    "fsdp": {
        "shards_optimizer_state",
        "shards_gradients",
        "shards_parameters",
        "needs_several_ranks",
        "sums_gradients_over_ranks_in_backward",
        "gathers_parameters_in_autocast_dtype",
    },
}


def test_strategies_have_properties() -> None:
    """What the package asks of a strategy is written down here, strategy by strategy."""
    found = {
        name: {item.name for item in fields(strategy) if getattr(strategy, item.name) is True}
        for name, strategy in STRATEGIES.items()
    }
    assert found == PROPERTIES


COMPARES_NAMES = {
    "launcher/planning/strategy.py",  # what defines them
    "launcher/engine/saving/checkpoint_tensors.py",  # a file that version 0.1 wrote under fsdp
}


def test_strategies_are_asked_for_properties() -> None:
    """No module compares the name of a strategy or of its backend with a text."""
    names = {*STRATEGIES, *(strategy.backend for strategy in STRATEGIES.values())}
    found = set()
    for path in sorted((ROOT / "launcher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                parts = [part for side in sides for part in getattr(side, "elts", [side])]
                texts = {part.value for part in parts if isinstance(part, ast.Constant)}
                if texts & names:
                    found.add(str(path.relative_to(ROOT)))
    assert found == COMPARES_NAMES


def test_a_plan_says_what_is_sharded() -> None:
    """It names the engine, what is sent through, and what lies in how many shards."""
    assert "8 GPUs, DDP over NCCL" in text(NODE, 8)
    assert "FSDP over NCCL: weights, gradients and optimizer state in 8 shards" in text(
        NODE, 8, strategy="fsdp"
    )
    assert "DeepSpeed ZeRO-1 over gloo: optimizer state in 2 shards" in text(
        LAPTOP, 2, strategy="zero1"
    )
    assert "one process, no process group" in text(LAPTOP, 1)
    assert make_plan(recipe(strategy="zero2"), LAPTOP, nproc_per_node=1).backend == "deepspeed"


def test_a_plan_lists_what_is_on() -> None:
    """Settings for speed come in one line; those of GPUs only where there are GPUs."""
    on = {"precision": "bf16", "compile": True, "channels_last": True, "tf32": True}
    assert "speed-ups precision=bf16, compile, channels_last, tf32 optimizer" in text(NODE, 2, **on)
    assert "speed-ups precision=bf16, compile, channels_last optimizer" in text(LAPTOP, 2, **on)
    assert "speed-ups none enabled: fp32" in text(LAPTOP, 2)


def test_a_plan_says_what_batch_norm_sees() -> None:
    """The samples behind BatchNorm's statistics, with and without synchronisation."""
    assert "statistics are over 128 samples, the micro-batch of one rank" in text(LAPTOP, 2)
    assert "statistics are over the global batch" in text(LAPTOP, 2, sync_batchnorm=True)
    assert "over 64 samples, one micro-batch of every rank; without accumulation they" in text(
        LAPTOP, 2, sync_batchnorm=True, micro_batch_size=32
    )


@pytest.mark.parametrize(
    ("changes", "machine", "ranks", "message"),
    [
        ({"strategy": "fsdp"}, {}, 1, "there is 1 rank. Use strategy=ddp"),
        ({"strategy": "zero2"}, {"has_deepspeed": False}, 2, "DeepSpeed is not installed"),
        ({"offload": "cpu"}, {}, 2, "strategy=ddp shards nothing"),
        ({"strategy": "zero1", "precision": "fp64"}, {}, 2, "DeepSpeed's, which keeps weights in"),
        ({"compile": True}, {"has_compiler": False}, 2, "needs a C++ compiler"),
    ],
)
def test_what_cannot_run_is_refused(
    changes: dict[str, Any], machine: dict[str, Any], ranks: int, message: str
) -> None:
    """The refusal names what is missing or contradicts, and comes before any process."""
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(**changes), replace(LAPTOP, **machine), nproc_per_node=ranks)
    assert message in str(caught.value)


def test_offloading_goes_with_what_shards() -> None:
    """Every sharding strategy takes offload=cpu."""
    for strategy in ("fsdp", "zero1", "zero2", "zero3"):
        plan = make_plan(recipe(strategy=strategy, offload="cpu"), LAPTOP, nproc_per_node=2)
        assert plan.performance_flags == ("offload=cpu",)


def test_ranks_agree_on_every_setting_that_moves_a_step() -> None:
    """Two plans that differ in such a setting say so; one that only reads otherwise does not."""
    one = make_plan(recipe(), LAPTOP)

    def differs(**changes: Any) -> set[str]:
        made: Recipe = recipe(**changes)
        return set(one.differences(make_plan(made, LAPTOP).agreement()))

    assert differs(max_grad_norm=1.0) == {"max_grad_norm"}
    assert "strategy" in differs(strategy="zero1")
    assert "channels_last" in differs(channels_last=True)
    assert differs(num_workers=0, prefetch_factor=3) == set()
