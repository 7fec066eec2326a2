"""What each setting affects, and the sets of settings that follow from it."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
from examples import LAPTOP, recipe

from launcher import Recipe, make_plan
from launcher.recipe.affects import Affects, effects_of
from launcher.recipe.recipe import setting_types, settings_affecting

FUNCTIONS = {
    "model",
    "data",
    "loss",
    "metrics",
    "callbacks",
    "forward",
    "predict",
    "predict_data",
    "count",
    "objectives",
    "tensor_parallel_plan",
}

SETTINGS = {
    Affects.SAMPLES: {
        "batch_size",
        "batch_size_per_gpu",
        "batch_tokens",
        "tokens_per_sample",
        "batch_milestones",
        "batch_gamma",
        "shuffle",
        "shuffle_window",
        "train_samples",
        "seed",
        "virtual_ranks",
    },
    Affects.UPDATES: {
        "optimizer",
        "schedule",
        "lr",
        "lr_batch_size",
        "lr_rule",
        "averaging",
        "epochs",
        "steps",
        "max_time",
        "weights",
        "strict_weights",
        "precision",
        "reduce_dtype",
        "param_dtype",
        "fp8",
        "max_grad_norm",
        "exact",
        "sync_batchnorm",
        "rank_buffers",
        "bad_samples",
        "tf32",
        "deterministic",
    },
    Affects.EXECUTION: {
        "micro_batch_size",
        "strategy",
        "tensor_parallel",
        "shard",
        "reshard_after_forward",
        "accumulate_unsharded",
        "prefetch_blocks",
        "offload",
        "compile",
        "activation_checkpointing",
        "blocks",
        "channels_last",
        "cudnn_benchmark",
        "device",
    },
    Affects.NODE: {
        "numa",
        "in_memory",
        "data_on_device",
        "num_workers",
        "worker_threads",
        "worker_start",
        "prefetch_factor",
        "pin_memory",
    },
    Affects.NOTHING: {
        "name",
        "evaluate_every",
        "checkpoint_every",
        "quick_checkpoint_every",
        "quick_checkpoints",
        "keep_checkpoints",
        "keep_best",
        "best_checkpoints",
        "stop_after",
        "max_bad_samples",
        "max_bad_steps",
        "hang_timeout",
        "noise_scale",
        "train_metrics",
        "trackers",
        "record_samples",
    },
}


def test_every_setting_says_what_it_affects() -> None:
    """Each field of a recipe is a part of its code or a setting with exactly one effect."""
    names = {item.name for item in fields(Recipe)}
    assert set(effects_of(Recipe)) == names - FUNCTIONS
    assert set(recipe().settings()) == names - FUNCTIONS
    assert set(setting_types()) == names - FUNCTIONS - {"optimizer", "schedule", "averaging"}


@pytest.mark.parametrize("part", Affects)
def test_settings_are_listed_by_what_they_affect(part: Affects) -> None:
    """Each part of a run is affected by exactly the settings that are listed for it."""
    assert set(settings_affecting(part)) == SETTINGS[part]


def test_ranks_agree_on_all_settings_but_those_of_a_node() -> None:
    """A plan's agreement holds every setting that may not differ between nodes."""
    agreement = make_plan(recipe(), LAPTOP).agreement()
    numbers = {"workers_per_rank", "threads_per_rank", "machine"}
    assert not agreement.keys() & (SETTINGS[Affects.NODE] | numbers)
    for part in set(Affects) - {Affects.NODE}:
        assert SETTINGS[part] <= agreement.keys()


@pytest.mark.parametrize(
    "changes",
    [
        {"in_memory": True},
        {"data_on_device": True},
        {"num_workers": 7, "worker_start": "spawn", "prefetch_factor": 5, "pin_memory": False},
    ],
)
def test_nodes_may_read_samples_differently(changes: dict[str, Any]) -> None:
    """Plans agree if they differ only in how a node reads its samples."""
    plan, other = make_plan(recipe(), LAPTOP), make_plan(recipe(**changes), LAPTOP)
    assert plan.differences(other.agreement()) == {}
