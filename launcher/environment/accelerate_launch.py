"""What `accelerate launch` was told that a recipe has a setting for, read from the environment.

It is weaker than a YAML file and the command line, and stronger than the recipe. What a recipe has
no setting for is refused rather than ignored.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from launcher.errors import WorldError
from launcher.recipe.overrides import Override

SOURCE = "accelerate launch"

_NOT_GIVEN = ("", "none", "auto")


def accelerate_settings(env: Mapping[str, str] | None = None) -> tuple[Override, ...]:
    """Return the settings that `accelerate launch` put into the environment as overrides.

    Args:
        env: The environment; None is this process's.

    Raises:
        WorldError: It was told to use something that recipes cannot.
    """
    env = os.environ if env is None else env
    found: dict[str, Any] = {}
    if _is_true(env, "ACCELERATE_USE_MEGATRON_LM"):
        raise WorldError(
            "accelerate launch was configured for Megatron-LM, which recipes do not train under. "
            "Use FSDP or DeepSpeed, or strategy=... with neither."
        )
    if _is_true(env, "ACCELERATE_USE_FSDP"):
        found = _fsdp(env)
    elif _is_true(env, "ACCELERATE_USE_DEEPSPEED"):
        found = _deepspeed(env)
    precision = env.get("ACCELERATE_MIXED_PRECISION", "no")
    if precision != "no":
        found["precision"] = precision
    compiler = env.get("ACCELERATE_DYNAMO_BACKEND", "no").lower()
    if compiler == "inductor":
        found["compile"] = True
    elif compiler != "no":
        raise WorldError(
            f"accelerate launch was configured to compile the model with {compiler}; recipes "
            "compile with inductor. Use `--dynamo_backend inductor`, or none and compile=true."
        )
    return tuple(Override(name=name, value=value, source=SOURCE) for name, value in found.items())


def _fsdp(env: Mapping[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {"strategy": "fsdp"}
    if _is_true(env, "FSDP_OFFLOAD_PARAMS"):
        found["offload"] = "cpu"
    if _is_true(env, "FSDP_ACTIVATION_CHECKPOINTING"):
        found["activation_checkpointing"] = True
    if blocks := env.get("FSDP_TRANSFORMER_CLS_TO_WRAP"):
        found["blocks"] = blocks
    return found


def _deepspeed(env: Mapping[str, str]) -> dict[str, Any]:
    prefix = "ACCELERATE_DEEPSPEED_"
    file = env.get(f"{prefix}CONFIG_FILE", "none")
    if file.lower() not in _NOT_GIVEN:
        return _deepspeed_file(Path(file))
    found = {"strategy": _zero(env.get(f"{prefix}ZERO_STAGE", "2"))}
    names = ("OFFLOAD_OPTIMIZER_DEVICE", "OFFLOAD_PARAM_DEVICE")
    found |= _offload(*(env.get(prefix + name, "none") for name in names))
    clip = env.get("ACCELERATE_GRADIENT_CLIPPING", "none")
    return found | _clipping(clip)


def _deepspeed_file(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
        zero = dict(config.get("zero_optimization", {}))
    except (OSError, ValueError, AttributeError, TypeError) as error:
        raise WorldError(f"Cannot read the DeepSpeed configuration {path}: {error}.") from None
    found = {"strategy": _zero(str(zero.get("stage", 0)))}
    devices = [zero.get(name) or {} for name in ("offload_optimizer", "offload_param")]
    found |= _offload(*(str(device.get("device", "none")) for device in devices))
    autocast = config.get("torch_autocast") or {}
    if autocast.get("enabled"):
        found["precision"] = "bf16" if autocast.get("dtype") == "bfloat16" else "fp16"
    for precision in ("bf16", "fp16"):
        if (config.get(precision) or {}).get("enabled") is True:
            found["precision"] = precision
    return found | _clipping(str(config.get("gradient_clipping", "none")))


def _zero(stage: str) -> str:
    if stage == "0":
        return "ddp"
    if stage in ("1", "2", "3"):
        return f"zero{stage}"
    raise WorldError(f"accelerate launch was configured for ZeRO stage {stage}: expected 0 to 3.")


def _offload(*devices: str) -> dict[str, Any]:
    for device in devices:
        if device.lower() not in (*_NOT_GIVEN, "cpu"):
            raise WorldError(
                f"accelerate launch was configured to offload to {device}; recipes offload to cpu."
            )
    return {"offload": "cpu"} if "cpu" in devices else {}


def _clipping(norm: str) -> dict[str, Any]:
    """Return the norm to clip at; 0 says none, and nothing leaves it to the recipe."""
    if norm.lower() in _NOT_GIVEN:
        return {}
    try:
        return {"max_grad_norm": float(norm) or None}
    except ValueError:
        raise WorldError(f"gradient_clipping={norm}: expected a number.") from None


def _is_true(env: Mapping[str, str], name: str) -> bool:
    return env.get(name, "").lower() in ("true", "1")
