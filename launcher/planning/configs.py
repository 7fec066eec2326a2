"""A plan as configuration files of Accelerate and DeepSpeed, with every value resolved.

The DeepSpeed backend uses the result of `deepspeed_config`, so that `launcher export` writes the
configuration that a run has. A run adds the size of the buckets of gradients alone, which follows
from its model.
"""

from __future__ import annotations

from typing import Any

from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.recipe import Recipe

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
"""Name of autocast's dtype in torch, by `Recipe.precision`."""

_LARGEST_BUCKET = 500_000_000
"""DeepSpeed's default reduce_bucket_size, in values."""


def reduce_bucket_size(num_trained: int) -> int:
    """Return DeepSpeed's reduce_bucket_size for a model with this many trained weights.

    DeepSpeed allocates a buffer of this many values, however small the model is. With this size,
    gradients are reduced in the same parts as with DeepSpeed's default.
    """
    return min(max(num_trained, 1), _LARGEST_BUCKET)


def deepspeed_config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a ZeRO plan.

    The configuration always contains the norm to clip at, because DeepSpeed clips at 1.0 by
    default. It does not contain the global batch size, which DeepSpeed would require to be a
    multiple of ranks times accumulation steps.
    """
    stage = STRATEGIES[plan.strategy].zero_stage
    zero: dict[str, Any] = {
        "stage": stage,
        "contiguous_gradients": True,
        "overlap_comm": plan.device == "cuda",
    }
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if recipe.offload is not None:
        target = {"device": recipe.offload, "pin_memory": plan.device == "cuda"}
        zero["offload_optimizer"] = dict(target)
        if stage == 3:
            zero["offload_param"] = dict(target)
    return {
        "train_micro_batch_size_per_gpu": plan.micro_batch_size,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm or 0.0,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "fp16": {"enabled": False},
        "bf16": {"enabled": False},
        "torch_autocast": {
            "enabled": plan.precision in AUTOCAST,
            "dtype": AUTOCAST.get(plan.precision, "bfloat16"),
            "lower_precision_safe_modules": [],
        },
        "steps_per_print": 1_000_000_000,
        "wall_clock_breakdown": False,
    }


def is_deepspeed_export(head: bytes) -> bool:
    """Return whether a file that begins with these bytes has the marks of `deepspeed_config`."""
    return b'"steps_per_print": 1000000000' in head and b'"zero_force_ds_cpu_optimizer"' in head


def process_environment(plan: Plan) -> dict[str, str]:
    """Return the environment variables that the plan's backend reads when it is imported."""
    return deepspeed_environment(plan.device) if STRATEGIES[plan.strategy].uses_deepspeed else {}


def deepspeed_environment(device: str) -> dict[str, str]:
    """Return the environment variable that names the kind of device when DeepSpeed is imported."""
    return {"DS_ACCELERATOR": device}


def accelerate_config(
    recipe: Recipe, plan: Plan, *, deepspeed_file: str | None = None
) -> dict[str, Any]:
    """Return the configuration with which `accelerate launch` starts the ranks of a plan.

    Args:
        recipe: The recipe of the plan.
        plan: The ranks to start.
        deepspeed_file: Path of the file with `deepspeed_config` of a ZeRO plan; None includes
            those of its values that Accelerate has fields for.
    """
    cpu = plan.device == "cpu"
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        # Accelerate starts several processes on CPUs only with this type.
        "distributed_type": "NO" if plan.backend == "local" else "MULTI_GPU",
        "downcast_bf16": "no",
        "dynamo_config": {"dynamo_backend": "INDUCTOR" if recipe.compile else "NO"},
        "enable_cpu_affinity": False,
        "gpu_ids": "all",
        "machine_rank": 0,
        "main_training_function": "main",
        "mixed_precision": plan.precision if plan.precision in AUTOCAST else "no",
        "num_machines": plan.nodes,
        "num_processes": plan.world_size,
        "rdzv_backend": "static",
        "same_network": True,
        "tpu_use_cluster": False,
        "use_cpu": cpu,
    }
    strategy = STRATEGIES[plan.strategy]
    if strategy.uses_fsdp:
        config["distributed_type"] = "FSDP"
        config["fsdp_config"] = {
            "fsdp_version": 2,
            "fsdp_reshard_after_forward": recipe.reshard_after_forward,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if recipe.blocks else "NO_WRAP",
            **({"fsdp_transformer_layer_cls_to_wrap": recipe.blocks} if recipe.blocks else {}),
            "fsdp_activation_checkpointing": recipe.activation_checkpointing,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_offload_params": recipe.offload == "cpu",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        }
        if plan.shards < plan.world_size:
            config["parallelism_config"] = {
                "parallelism_config_dp_replicate_size": plan.data_ranks // plan.shards,
                "parallelism_config_dp_shard_size": plan.shards,
            }
            if plan.tensor_parallel > 1:
                size = plan.tensor_parallel
                config["parallelism_config"]["parallelism_config_tp_size"] = size
    elif strategy.uses_deepspeed:
        config["distributed_type"] = "DEEPSPEED"
        config["deepspeed_config"] = _deepspeed_fields(recipe, plan, deepspeed_file)
        if deepspeed_file is not None:
            del config["mixed_precision"]  # Accelerate refuses a value that the file has as well
    return config


def _deepspeed_fields(recipe: Recipe, plan: Plan, file: str | None) -> dict[str, Any]:
    launcher = {"deepspeed_multinode_launcher": "standard", "zero3_init_flag": False}
    if file is not None:
        return {"deepspeed_config_file": file, **launcher}
    stage = STRATEGIES[plan.strategy].zero_stage
    return {
        "zero_stage": stage,
        "gradient_accumulation_steps": plan.accumulation_steps,
        "gradient_clipping": recipe.max_grad_norm or 0.0,
        "offload_optimizer_device": recipe.offload or "none",
        "offload_param_device": (recipe.offload or "none") if stage == 3 else "none",
        **launcher,
    }
