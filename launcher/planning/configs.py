"""A plan as the configuration files of the engines that carry it out, every value resolved.

The DeepSpeed backend runs with what `deepspeed_config` returns, so that the file which
`launcher export` writes is the one that was used.
"""

from __future__ import annotations

from typing import Any

from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.recipe import Recipe

AUTOCAST = {"bf16": "bfloat16", "fp16": "float16"}
"""The dtype's name in torch, by `Recipe.precision`."""


def deepspeed_config(recipe: Recipe, plan: Plan) -> dict[str, Any]:
    """Return the DeepSpeed configuration of a ZeRO plan.

    DeepSpeed clips at 1.0 unless told otherwise, so the norm is always given. The batch size is
    not: DeepSpeed would insist that it divides by ranks and accumulation steps.
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
        where = {"device": recipe.offload, "pin_memory": plan.device == "cuda"}
        zero["offload_optimizer"] = dict(where)
        if stage == 3:
            zero["offload_param"] = dict(where)
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


def process_environment(plan: Plan) -> dict[str, str]:
    """Return the variables that an engine of the plan reads while it is imported."""
    if STRATEGIES[plan.strategy].uses_deepspeed:
        return {"DS_ACCELERATOR": plan.device}
    return {}


def accelerate_config(
    recipe: Recipe, plan: Plan, *, deepspeed_file: str | None = None
) -> dict[str, Any]:
    """Return the configuration of `accelerate launch` that starts the ranks of a plan.

    Args:
        recipe: The recipe of the plan.
        plan: What to start.
        deepspeed_file: The file with `deepspeed_config`, for a ZeRO plan; None writes the few of
            its values here that Accelerate has fields for.
    """
    cpu = plan.device == "cpu"
    config: dict[str, Any] = {
        "compute_environment": "LOCAL_MACHINE",
        "debug": False,
        # Accelerate starts several processes on CPUs only under this name.
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
            "fsdp_reshard_after_forward": True,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP" if recipe.blocks else "NO_WRAP",
            **({"fsdp_transformer_layer_cls_to_wrap": recipe.blocks} if recipe.blocks else {}),
            "fsdp_activation_checkpointing": recipe.activation_checkpointing,
            "fsdp_cpu_ram_efficient_loading": False,
            "fsdp_offload_params": recipe.offload == "cpu",
            "fsdp_state_dict_type": "FULL_STATE_DICT",
        }
    elif strategy.uses_deepspeed:
        config["distributed_type"] = "DEEPSPEED"
        config["deepspeed_config"] = _deepspeed_fields(recipe, plan, deepspeed_file)
        if deepspeed_file is not None:
            del config["mixed_precision"]  # said in that file, and Accelerate wants it said once
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
