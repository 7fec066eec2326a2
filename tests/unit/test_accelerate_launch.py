"""Options of `accelerate launch` become settings of the recipe, or are refused."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from examples import LAPTOP, recipe

from launcher import Recipe, WorldError, make_plan
from launcher.environment.accelerate_launch import accelerate_settings
from launcher.environment.unused_configuration import unused_note
from launcher.planning.configs import accelerate_config, deepspeed_config

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


def example() -> Recipe:
    return recipe()


def settings(env: dict[str, str]) -> dict[str, Any]:
    """Return the settings that the environment `env` gives, by name."""
    overrides = accelerate_settings({"ACCELERATE_MIXED_PRECISION": "no"} | env)
    assert all(override.source == "accelerate launch" for override in overrides)
    return {override.name: override.value for override in overrides}


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({}, {}),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, {"precision": "bf16"}),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, {"compile": True}),
        ({"ACCELERATE_DYNAMO_BACKEND": "NO"}, {}),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_OFFLOAD_PARAMS": "false"}, {"strategy": "fsdp"}),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_OFFLOAD_PARAMS": "true",
                "FSDP_ACTIVATION_CHECKPOINTING": "true",
                "FSDP_TRANSFORMER_CLS_TO_WRAP": "Block",
            },
            {
                "strategy": "fsdp",
                "offload": "cpu",
                "activation_checkpointing": True,
                "blocks": "Block",
            },
        ),
        (
            {
                "ACCELERATE_USE_FSDP": "true",
                "FSDP_RESHARD_AFTER_FORWARD": "false",
                "ACCELERATE_USE_PARALLELISM_CONFIG": "true",
                "PARALLELISM_CONFIG_DP_REPLICATE_SIZE": "2",
                "PARALLELISM_CONFIG_DP_SHARD_SIZE": "4",
            },
            {"strategy": "fsdp", "reshard_after_forward": False, "shard": 4},
        ),
        (DEEPSPEED, {"strategy": "zero2"}),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, {"strategy": "ddp"}),
        (
            DEEPSPEED
            | {
                "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
                "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "cpu",
                "ACCELERATE_GRADIENT_CLIPPING": "0.5",
            },
            {"strategy": "zero3", "offload": "cpu", "max_grad_norm": 0.5},
        ),
        (DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "auto"}, {"strategy": "zero2"}),
    ],
)
def test_settings_are_read(env: dict[str, str], expected: dict[str, Any]) -> None:
    """Strategy, offloading, precision, clipping and compilation are read from the environment."""
    assert settings(env) == expected


def test_a_deepspeed_file_is_read(tmp_path: Path) -> None:
    """An exported file gives the settings that it was exported from, with clipping disabled."""
    offloaded = recipe(strategy="zero3", precision="bf16", offload="cpu")
    plan = make_plan(offloaded, LAPTOP, nproc_per_node=2)
    file = tmp_path / "deepspeed.json"
    file.write_text(json.dumps(deepspeed_config(offloaded, plan)))
    assert settings(DEEPSPEED | {FILE: str(file)}) == {
        "strategy": "zero3",
        "offload": "cpu",
        "precision": "bf16",
        "max_grad_norm": None,
    }


@pytest.mark.parametrize(
    ("env", "message"),
    [
        ({"ACCELERATE_USE_MEGATRON_LM": "true"}, "Megatron-LM"),
        ({"ACCELERATE_DYNAMO_BACKEND": "eager"}, "eager"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "4"}, "ZeRO stage 4"),
        (DEEPSPEED | {"ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_DEVICE": "nvme"}, "nvme"),
        (DEEPSPEED | {FILE: "/none.json"}, "/none.json"),
        (DEEPSPEED | {"ACCELERATE_GRADIENT_CLIPPING": "x"}, "gradient_clipping=x"),
    ],
)
def test_what_recipes_cannot_do_is_refused(env: dict[str, str], message: str) -> None:
    """An option that recipes do not support is refused by name, not ignored."""
    with pytest.raises(WorldError) as caught:
        settings(env)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        '{"zero_optimization": []}',
        '{"zero_optimization": {"stage": [1]}}',
        '{"zero_optimization": {"stage": 2, "offload_param": "cpu"}}',
        '{"bf16": true}',
        '{"gradient_clipping": {}}',
        '{"gradient_clipping": 1e999}',
        '{"x": ' + "1" * 5000 + "}",
        "[" * 100_000,
    ],
)
def test_a_deepspeed_file_that_is_none_is_refused(tmp_path: Path, content: str) -> None:
    """A file with other types, too deep or too large values is one error that names the file."""
    file = tmp_path / "deepspeed.json"
    file.write_text(content)
    with pytest.raises(WorldError, match=f"^{file} cannot be used: "):
        settings(DEEPSPEED | {FILE: str(file)})
    unused_note({}, DEEPSPEED | {FILE: str(file)})  # leaves the error to the settings


def test_a_deepspeed_file_that_never_ends_is_refused(tmp_path: Path) -> None:
    """A FIFO or a device as the file is refused at once."""
    os.mkfifo(tmp_path / "fifo")
    for file in (tmp_path / "fifo", Path("/dev/zero")):
        with pytest.raises(WorldError, match=f"Cannot read {file}: "):
            settings(DEEPSPEED | {FILE: str(file)})


def test_a_deepspeed_file_with_many_values_gives_one_note(tmp_path: Path) -> None:
    """A note lists the first forty values, and says how many follow."""
    text = note({f"option{number}": 1 for number in range(1000)}, tmp_path / "ds.json")
    assert text is not None
    assert text.count("option") == 40
    assert text.endswith("and 960 more.")


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "zero1", "zero3"])
def test_exported_configurations_are_complete(strategy: str) -> None:
    """No value of an exported configuration is "auto" or missing."""
    clipped: Recipe = recipe(strategy=strategy, max_grad_norm=0.3)
    plan = make_plan(clipped, LAPTOP, nproc_per_node=4)
    values = json.dumps([accelerate_config(clipped, plan), deepspeed_config(clipped, plan)])
    assert "auto" not in values.replace("torch_autocast", "").replace("fsdp_auto_wrap", "")
    assert "null" not in values
    assert deepspeed_config(clipped, plan)["gradient_clipping"] == 0.3
    assert deepspeed_config(recipe(strategy=strategy), plan)["gradient_clipping"] == 0.0


def note(values: dict[str, Any], file: Path, **recipe_fields: Any) -> str | None:
    """Return the note about a DeepSpeed file with `values`, for a run of zero2 on 2 ranks."""
    file.write_text(json.dumps(values))
    sharded = recipe(strategy="zero2", **recipe_fields)
    used = deepspeed_config(sharded, make_plan(sharded, LAPTOP, nproc_per_node=2))
    return unused_note(used, DEEPSPEED | {FILE: str(file)})


def test_what_is_not_used_of_a_deepspeed_file_is_listed(tmp_path: Path) -> None:
    """One note names each value that the run does not have, with the setting to write instead."""
    text = note(
        {
            "train_micro_batch_size_per_gpu": 16,
            "gradient_accumulation_steps": 2,
            "zero_optimization": {"stage": 2, "reduce_bucket_size": 1000000},
            "bf16": {"enabled": True},
            "gradient_clipping": 0.5,
            "wall_clock_breakdown": True,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1, "weight_decay": 0.2}},
            "scheduler": {"type": "WarmupDecayLR", "params": {"warmup_num_steps": 50}},
            "prescale_gradients": "auto",
            "\x1b[2J": "\x1b[2J",
        },
        tmp_path / "ds.json",
    )
    assert text is not None
    for found in (
        f"Not used from {tmp_path / 'ds.json'}: train_micro_batch_size_per_gpu=16 (write micro_",
        "(write micro_batch_size=16), gradient_accumulation_steps=2 (follows",
        "zero_optimization.reduce_bucket_size=1000000, wall_clock_breakdown=true",
        "optimizer.type=AdamW (write optimizer=adamw)",
        'optimizer.params.weight_decay=0.2 (write "optimizer=adamw(weight_decay=0.2)")',
        'scheduler.type=WarmupDecayLR (write "schedule=warmup(linear())")',
        'warmup_num_steps=50 (write "schedule=warmup(cosine(), steps=50)")',
    ):
        assert found in text
    for absent in ("stage", "bf16", "clipping", "prescale", "\x1b"):
        assert absent not in text


def test_what_a_run_has_anyway_is_not_listed(tmp_path: Path) -> None:
    """An exported configuration gives no note, and neither do the defaults of Accelerate."""
    plan = make_plan(recipe(strategy="zero2"), LAPTOP, nproc_per_node=2)
    exported = deepspeed_config(recipe(strategy="zero2"), plan)
    assert note(exported, tmp_path / "ds.json") is None
    changed = exported | {"gradient_accumulation_steps": 7}
    assert "gradient_accumulation_steps=7" in (note(changed, tmp_path / "ds.json") or "")
    for env in (
        {},
        {"ACCELERATE_DYNAMO_MODE": "default", "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1"},
        {"ACCELERATE_USE_FSDP": "true", "FSDP_SHARDING_STRATEGY": "FULL_SHARD"},
        {"FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP"},
    ):
        assert unused_note({}, env) is None


def test_options_of_accelerate_that_are_not_used_are_listed() -> None:
    """Options of `accelerate launch` without an effect are named with their values."""
    env = {
        "ACCELERATE_USE_FSDP": "true",
        "FSDP_SHARDING_STRATEGY": "SHARD_GRAD_OP",
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4",
    }
    text = unused_note({}, env) or ""
    assert "gradient_accumulation_steps=4 (follows" in text
    assert "accumulation" not in (unused_note({"gradient_accumulation_steps": 4}, env) or "")
    assert "fsdp_sharding_strategy=SHARD_GRAD_OP" in text
