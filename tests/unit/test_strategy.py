"""Strategies and the settings for speed: their properties, and what a plan shows and refuses."""

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
    """Return the text of a plan, on one line."""
    plan = make_plan(recipe(**changes), machine, nproc_per_node=ranks)
    return " ".join(explain(plan).split())


def test_recipes_take_every_strategy() -> None:
    """A recipe takes the name of each strategy, and no other."""
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
    """Each strategy has exactly the properties that are listed for it."""
    properties = {
        name: {item.name for item in fields(strategy) if getattr(strategy, item.name) is True}
        for name, strategy in STRATEGIES.items()
    }
    assert properties == PROPERTIES


COMPARES_NAMES = {
    "launcher/planning/strategy.py",  # the definition of the properties
    "launcher/engine/saving/checkpoint_tensors.py",  # a property of old files, not of a strategy
}


def test_strategies_are_asked_for_properties() -> None:
    """No module compares the name of a strategy or of its backend with a string."""
    names = {*STRATEGIES, *(strategy.backend for strategy in STRATEGIES.values())}
    modules = set()
    for path in sorted((ROOT / "launcher").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Compare):
                sides = [node.left, *node.comparators]
                parts = [part for side in sides for part in getattr(side, "elts", [side])]
                texts = {part.value for part in parts if isinstance(part, ast.Constant)}
                if texts & names:
                    modules.add(str(path.relative_to(ROOT)))
    assert modules == COMPARES_NAMES


def test_a_plan_shows_what_is_sharded() -> None:
    """The plan names the backend, the communication library, and what is in how many shards."""
    assert "8 GPUs, DDP over NCCL" in text(NODE, 8)
    assert "FSDP over NCCL: weights, gradients and optimizer state in 8 shards" in text(
        NODE, 8, strategy="fsdp"
    )
    assert "DeepSpeed ZeRO-1 over gloo: optimizer state in 2 shards" in text(
        LAPTOP, 2, strategy="zero1"
    )
    assert "one process, no process group" in text(LAPTOP, 1)
    assert make_plan(recipe(strategy="zero2"), LAPTOP, nproc_per_node=1).backend == "deepspeed"


def test_a_plan_lists_performance_flags() -> None:
    """The plan lists the settings for speed that are enabled; those of GPUs only on GPUs."""
    flags = {"precision": "bf16", "compile": True, "channels_last": True, "tf32": True}
    assert "speed-ups precision=bf16, compile, channels_last, tf32 optimizer" in text(
        NODE, 2, **flags
    )
    assert "speed-ups precision=bf16, compile, channels_last optimizer" in text(LAPTOP, 2, **flags)
    assert "speed-ups none enabled: fp32" in text(LAPTOP, 2)


def test_a_plan_shows_the_samples_of_batch_norm() -> None:
    """The plan shows over how many samples BatchNorm's statistics are, synchronised or not."""
    assert "over 128 samples" in text(LAPTOP, 2)
    assert "over the global batch" in text(LAPTOP, 2, sync_batchnorm=True)
    assert "over 64 samples" in text(LAPTOP, 2, sync_batchnorm=True, micro_batch_size=32)


@pytest.mark.parametrize(
    ("changes", "machine", "ranks", "message"),
    [
        ({"deterministic": True, "cudnn_benchmark": True}, {}, 1, "cudnn_benchmark=true"),
        ({"strategy": "fsdp"}, {}, 1, "strategy=fsdp shards"),
        ({"strategy": "zero2"}, {"has_deepspeed": False}, 2, "pip install deepspeed"),
        ({"offload": "cpu"}, {}, 2, "strategy=ddp shards nothing"),
        ({"strategy": "zero1", "precision": "fp64"}, {}, 2, "precision=fp64"),
        ({"compile": True}, {"has_compiler": False}, 2, "$CXX, g++"),
    ],
)
def test_strategies_that_cannot_run_are_refused(
    changes: dict[str, Any], machine: dict[str, Any], ranks: int, message: str
) -> None:
    """A strategy that cannot run is refused with what is missing or contradicts it."""
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(**changes), replace(LAPTOP, **machine), nproc_per_node=ranks)
    assert message in str(caught.value)


def test_sharding_strategies_can_offload() -> None:
    """Every strategy that shards takes offload=cpu."""
    for strategy in ("fsdp", "zero1", "zero2", "zero3"):
        plan = make_plan(recipe(strategy=strategy, offload="cpu"), LAPTOP, nproc_per_node=2)
        assert plan.performance_flags == ("offload=cpu",)


def test_ranks_agree_on_every_setting_that_changes_a_step() -> None:
    """Plans differ by a setting that changes a step, and not by one that only changes reading."""
    plan = make_plan(recipe(), LAPTOP)

    def differences(**changes: Any) -> set[str]:
        changed: Recipe = recipe(**changes)
        return set(plan.differences(make_plan(changed, LAPTOP).agreement()))

    assert differences(max_grad_norm=1.0) == {"max_grad_norm"}
    assert "strategy" in differences(strategy="zero1")
    assert "channels_last" in differences(channels_last=True)
    assert differences(num_workers=0, prefetch_factor=3) == set()
