"""Options of `accelerate launch` become settings of the recipe, or are refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from examples import LAPTOP, recipe

from launcher import Recipe, WorldError, make_plan
from launcher.environment.accelerate_launch import accelerate_settings
from launcher.planning.configs import accelerate_config, deepspeed_config

DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}
FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"


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
