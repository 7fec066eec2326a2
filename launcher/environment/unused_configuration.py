"""Values of one's own DeepSpeed or Accelerate configuration that a run does not use.

A run has the configuration that its plan states, and nothing of a user's file but the settings that
`launcher.environment.accelerate_launch` reads. This module names the rest, so that nobody believes
it to be in effect.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from launcher.environment.accelerate_launch import deepspeed_file, read_deepspeed_file
from launcher.errors import WorldError
from launcher.json_file import encode_json
from launcher.printable import printable_line
from launcher.recipe.foreign_names import hint_for_value, setting_for

_READ = (
    "zero_optimization.stage",
    "zero_optimization.offload_optimizer.device",
    "zero_optimization.offload_param.device",
    "gradient_clipping",
    "bf16.enabled",
    "fp16.enabled",
    "torch_autocast.enabled",
    "torch_autocast.dtype",
)
"""Values of a DeepSpeed file that become settings of the recipe."""

_EXPLANATIONS = {
    "gradient_accumulation_steps": "follows from batch_size and micro_batch_size",
    "wall_clock_breakdown": "`launcher profile` measures it",
    "tensorboard.enabled": "write trackers=tensorboard",
    "wandb.enabled": "write trackers=wandb",
}
"""What to write or do instead of a value of a DeepSpeed file, where its name does not say it."""

_OPTIONS = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("1", "auto", "none"),
    "ACCELERATE_DYNAMO_MODE": ("default",),
    "ACCELERATE_DYNAMO_USE_FULLGRAPH": ("false",),
    "ACCELERATE_DYNAMO_USE_DYNAMIC": ("false",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_OPTIMIZER_NVME_PATH": ("none",),
    "ACCELERATE_DEEPSPEED_OFFLOAD_PARAM_NVME_PATH": ("none",),
    "FSDP_SHARDING_STRATEGY": ("full_shard", "1", "none"),
    "FSDP_RESHARD_AFTER_FORWARD": ("true", "full_shard", "false", "shard_grad_op"),
    "FSDP_FORWARD_PREFETCH": ("false",),
    "FSDP_ACTIVATION_CHECKPOINTING_OFFLOAD": ("false",),
    "FSDP_IGNORED_MODULES": ("none",),
}
"""Variables of `accelerate launch` that are not used, and the values that ask for nothing."""

_MOST = 40
"""Values that a note lists at most."""

_DEFAULTS: tuple[Any, ...] = (None, "auto", "none", [], {})
"""Values by which a DeepSpeed file leaves an option to others."""


def unused_note(used: Mapping[str, Any], env: Mapping[str, str] | None = None) -> str | None:
    """Return one note that lists the values of the user's configuration that are not used.

    Args:
        used: The DeepSpeed configuration that the run has; empty if it does not use DeepSpeed.
        env: The environment; None reads this process's.

    Returns:
        The note; None if everything is used.
    """
    env = os.environ if env is None else env
    file = deepspeed_file(env)
    options = [item for item in _unused_options(env) if str(used.get(item[0])) != item[1]]
    found = [_described(*item) for item in options]
    place = "accelerate launch's configuration"
    if file is not None:
        found = [*(_described(*item) for item in _unused_of_file(file, used)), *found]
        place = printable_line(str(file))
    if not found:
        return None
    more = [f"and {len(found) - _MOST} more"] if len(found) > _MOST else []
    return f"Not used from {place}: {', '.join([*found[:_MOST], *more])}."


def _unused_of_file(file: Path, used: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    try:
        given = read_deepspeed_file(file, dict[str, Any])
    except WorldError:
        return  # reading the settings has refused the file
    effective = dict(_leaves(used))
    for name, value in _leaves(given):
        if name not in _READ and value not in _DEFAULTS and effective.get(name) != value:
            yield name, value


def _unused_options(env: Mapping[str, str]) -> Iterator[tuple[str, Any]]:
    for name, defaults in _OPTIONS.items():
        value = env.get(name, "")
        is_of_fsdp = name.startswith("FSDP_")
        if is_of_fsdp and env.get("ACCELERATE_USE_FSDP", "").lower() not in ("true", "1"):
            continue
        if value and value.lower() not in defaults:
            yield name.removeprefix("ACCELERATE_").removeprefix("DEEPSPEED_").lower(), value


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings by their dotted names."""
    for name, value in values.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _described(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else encode_json(value)
    text = printable_line(text)
    shown = f"{printable_line(name)}={text if len(text) <= 40 else '...'}"
    section, _, last = name.rpartition(".")
    if name in _EXPLANATIONS:
        return f"{shown} ({_EXPLANATIONS[name]})"
    instead = setting_for(last, text)
    if last == "type":
        kind = {"optimizer": "optimizer", "scheduler": "schedule"}.get(section, "")
        instead = hint_for_value(kind, text).removeprefix(" Write ").removesuffix(" instead.")
    return f"{shown} (write {instead})" if instead else shown
