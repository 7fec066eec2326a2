"""Settings that `accelerate launch` passes on through the environment, as overrides of a recipe.

They override the recipe; a YAML file and the command line override them. An option that recipes
have no setting for is refused rather than ignored.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import WorldError
from launcher.json_file import read_json
from launcher.recipe.overrides import Override

SOURCE = "accelerate launch"
"""The source of these overrides, which a plan shows."""

T = TypeVar("T")

_UNSET = ("", "none", "auto")
"""Values by which Accelerate and DeepSpeed leave an option to others."""


@dataclass(frozen=True, kw_only=True)
class _Offload:
    """Where a DeepSpeed file puts state."""

    device: str | None = None
    """`cpu`, `nvme` or `none`."""


@dataclass(frozen=True, kw_only=True)
class _Zero:
    """The section zero_optimization of a DeepSpeed file."""

    stage: int | str = 0
    """What is sharded, from 0 to 3."""

    offload_optimizer: _Offload | None = None
    """Where optimizer state is kept."""

    offload_param: _Offload | None = None
    """Where weights are kept."""


@dataclass(frozen=True, kw_only=True)
class _Precision:
    """The section bf16, fp16 or torch_autocast of a DeepSpeed file."""

    enabled: bool | str | None = None
    """Whether the section applies; `auto` leaves it to others."""

    dtype: str | None = None
    """The dtype of torch_autocast."""


@dataclass(frozen=True, kw_only=True)
class _DeepSpeedFile:
    """The values of a DeepSpeed file that become settings of the recipe."""

    zero_optimization: _Zero | None = field(default_factory=_Zero)
    """What is sharded and offloaded."""

    torch_autocast: _Precision | None = None
    """Automatic mixed precision."""

    bf16: _Precision | None = None
    """Whether weights are bf16."""

    fp16: _Precision | None = None
    """Whether weights are fp16."""

    gradient_clipping: float | str | None = None
    """The norm to clip at; 0 disables clipping."""


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
    if env.get("FSDP_RESHARD_AFTER_FORWARD", "").lower() in ("false", "shard_grad_op"):
        settings["reshard_after_forward"] = False
    if _is_true(env, "ACCELERATE_USE_PARALLELISM_CONFIG"):
        settings["shard"] = _shard(env)
    return settings


def _shard(env: Mapping[str, str]) -> str | int:
    """Return the ranks that share each weight, of a parallelism_config.

    Raises:
        WorldError: A size is not a whole number.
    """
    sizes = []
    for name in ("DP_REPLICATE_SIZE", "DP_SHARD_SIZE"):
        text = env.get(f"PARALLELISM_CONFIG_{name}", "1")
        if not text.isdecimal():
            raise WorldError(
                f"accelerate launch is configured with parallelism_config_{name.lower()}={text}: "
                "expected a whole number."
            )
        sizes.append(int(text))
    copies, shards = sizes
    return "all" if copies == 1 else shards


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


def _settings_of_file(path: Path) -> dict[str, Any]:
    config = read_deepspeed_file(path, _DeepSpeedFile)
    zero = config.zero_optimization or _Zero()
    settings = {"strategy": _strategy_of_stage(str(zero.stage))}
    sections = zero.offload_optimizer, zero.offload_param
    settings |= _offload(*(section.device or "none" for section in sections if section))
    autocast = config.torch_autocast
    if autocast is not None and autocast.enabled:
        settings["precision"] = "bf16" if autocast.dtype == "bfloat16" else "fp16"
    for name, section in (("bf16", config.bf16), ("fp16", config.fp16)):
        if section is not None and section.enabled is True:
            settings["precision"] = name
    norm = config.gradient_clipping
    return settings | _clipping("none" if norm is None else str(norm))


def read_deepspeed_file(path: Path, kind: type[T]) -> T:
    """Return the user's DeepSpeed file as a value of a type.

    Raises:
        WorldError: The file cannot be read, or is not a DeepSpeed configuration.
    """
    return read_json(
        path,
        kind,
        error=WorldError,
        is_ours=False,
        remedy="Give --deepspeed_config_file another file.",
    )


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
