"""Settings that `accelerate launch` passes on through the environment, as overrides of a recipe.

They override the recipe; a YAML file and the command line override them. An option that recipes
have no setting for is refused rather than ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import WorldError
from launcher.recipe.overrides import Override

SOURCE = "accelerate launch"
"""The source of these overrides, which a plan shows."""

_UNSET = ("", "none", "auto")
"""Values by which Accelerate and DeepSpeed leave an option to others."""


def accelerate_settings(env: Mapping[str, str] | None = None) -> tuple[Override, ...]:
    """Return the options of `accelerate launch` that recipes have settings for, as overrides.

    Args:
        env: The environment; None reads this process's.

    Raises:
        WorldError: An option asks for something that recipes do not support.
    """
    env = os.environ if env is None else env
    settings: dict[str, Any] = {}
    if _is_true(env, "ACCELERATE_USE_MEGATRON_LM"):
        raise WorldError(
            "accelerate launch is configured for Megatron-LM, which recipes do not support. "
            "Configure FSDP or DeepSpeed, or neither of them, with strategy=..."
        )
    if _is_true(env, "ACCELERATE_USE_FSDP"):
        settings = _fsdp(env)
    elif _is_true(env, "ACCELERATE_USE_DEEPSPEED"):
        settings = _deepspeed(env)
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        settings["precision"] = precision
    compiler = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler == "inductor":
        settings["compile"] = True
    elif compiler != "no":
        raise WorldError(
            f"accelerate launch is configured to compile the model with {compiler}, and recipes "
            "compile with inductor. Use `--dynamo_backend inductor`, or leave it out and use "
            "compile=true."
        )
    return tuple(
        Override(name=name, value=value, source=SOURCE) for name, value in settings.items()
    )


def _fsdp(env: Mapping[str, str]) -> dict[str, Any]:
    settings: dict[str, Any] = {"strategy": "fsdp"}
    if _is_true(env, "FSDP_OFFLOAD_PARAMS"):
        settings["offload"] = "cpu"
    if _is_true(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        settings["activation_checkpointing"] = True
    if blocks := env.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        settings["blocks"] = blocks
    return settings


def _deepspeed(env: Mapping[str, str]) -> dict[str, Any]:
    prefix = "ACCELERATE_DEEPSPEED_"
    file = deepspeed_file(env)
    if file is not None:
        return _settings_of_file(file)
    settings = {"strategy": _strategy_of_stage(env.get(f"{prefix}ZERO_STAGE", "2"))}
    names = ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE")
    settings |= _offload(*(env.get(prefix + name, "none") for name in names))
    norm = env.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    return settings | _clipping(norm)


def deepspeed_file(env: Mapping[str, str]) -> Path | None:
    """Return the user's DeepSpeed file that `accelerate launch` names in `env`, or None."""
    if not _is_true(env, "ACCELERATE_USE_DEEPSPEED"):
        return None
    file = env.get("ACCELERATE_DEEPSPEED_CONFIG_FILE", "none")
    return None if file.lower() in _UNSET else Path(file)


def deepspeed_values(path: Path) -> dict[str, Any]:
    """Return the content of a DeepSpeed file.

    Raises:
        WorldError: It cannot be read, or is not a JSON object.
    """
    from launcher.json_file import read_json

    return read_json(path, dict[str, Any], error=WorldError)


def _settings_of_file(path: Path) -> dict[str, Any]:
    config = deepspeed_values(path)
    zero = _section(path, config, "zero_optimization")
    settings = {"strategy": _strategy_of_stage(str(zero.get("stage", 0)))}
    devices = [_section(path, zero, name) for name in ("offload_optimizer", "offload_param")]
    settings |= _offload(*(str(device.get("device", "none")) for device in devices))
    autocast = _section(path, config, "torch_autocast")
    if autocast.get("enabled"):
        settings["precision"] = "bf16" if autocast.get("dtype") == "bfloat16" else "fp16"
    for precision in ("bf16", "fp16"):
        if _section(path, config, precision).get("enabled") is True:
            settings["precision"] = precision
    return settings | _clipping(str(config.get("gradient_clipping", "none")))


def _section(path: Path, values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """Return an object in a DeepSpeed file; an empty one if the file has none.

    Raises:
        WorldError: The value is not an object.
    """
    section = values.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise WorldError(f"{path}: {name} is not an object. DeepSpeed expects {{...}} there.")
    return section


def _strategy_of_stage(stage: str) -> str:
    if stage == "0":
        return "ddp"
    if stage in ("1", "2", "3"):
        return f"zero{stage}"
    raise WorldError(f"accelerate launch is configured for ZeRO stage {stage}: expected 0 to 3.")


def _offload(*devices: str) -> dict[str, Any]:
    for device in devices:
        if device.lower() not in (*_UNSET, "cpu"):
            raise WorldError(
                f"accelerate launch is configured to offload to {device}, and recipes can offload "
                "only to cpu. Use cpu or none."
            )
    return {"offload": "cpu"} if "cpu" in devices else {}


def _clipping(norm: str) -> dict[str, Any]:
    """Return the setting for a norm to clip at: 0 disables clipping, none leaves it to the recipe.

    Raises:
        WorldError: The norm is not a number.
    """
    if norm.lower() in _UNSET:
        return {}
    try:
        return {"max_grad_norm": float(norm) or None}
    except ValueError:
        raise WorldError(f"gradient_clipping={norm}: expected a number.") from None


def _is_true(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("true", "1")
