"""The formats in which weights, optimizer states and products are kept, and who can hold them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe

if TYPE_CHECKING:
    from launcher.planning.strategy import Strategy


def check_number_formats(
    recipe: Recipe, strategy: Strategy, machine: Machine, device: str, world_size: int
) -> None:
    """Refuse an optimizer or a number format that the strategy or the device cannot hold.

    Args:
        recipe: The recipe.
        strategy: The recipe's strategy.
        machine: The machine that each node is taken to be.
        device: `cuda` or `cpu`.
        world_size: Number of ranks.

    Raises:
        PlanError: The plan cannot run.
    """
    _check_optimizer(recipe, strategy)
    if recipe.param_dtype != "fp32":
        _check_param_dtype(recipe, strategy, world_size)
    if recipe.fp8:
        _check_fp8(recipe, strategy, machine, device)


def _check_optimizer(recipe: Recipe, strategy: Strategy) -> None:
    """Refuse a named optimizer that DeepSpeed's flat pieces of weights do not suffice for.

    Raises:
        PlanError: The optimizer needs shapes, and the strategy uses DeepSpeed.
    """
    optimizer = recipe.optimizer
    if not isinstance(optimizer, OptimizerSpec) or not strategy.uses_deepspeed:
        return
    if optimizer.needs_shapes is not None:
        raise PlanError(
            f"optimizer={optimizer} {optimizer.needs_shapes}, and under "
            f"strategy={recipe.strategy} DeepSpeed gives an optimizer pieces of weights in one "
            "flat tensor. Use strategy=ddp or strategy=fsdp, or optimizer=adamw()."
        )


def _check_param_dtype(recipe: Recipe, strategy: Strategy, world_size: int) -> None:
    """Refuse weights in bf16 where they would lose updates, or need more memory instead of less.

    Raises:
        PlanError: A setting contradicts them.
    """
    asked = f"param_dtype={recipe.param_dtype}"
    if recipe.precision != recipe.param_dtype:
        raise PlanError(
            f"{asked} keeps the weights in bf16, and precision={recipe.precision} computes in "
            "another precision. Use precision=bf16, or leave param_dtype out."
        )
    if strategy.uses_deepspeed:
        raise PlanError(
            f"{asked} leaves out a copy of the weights in fp32, and under "
            f"strategy={recipe.strategy} DeepSpeed keeps one. Use strategy=fsdp or strategy=ddp, "
            "or leave param_dtype out."
        )
    if not isinstance(recipe.optimizer, OptimizerSpec):
        raise PlanError(
            f"{asked} needs an optimizer that rounds weights stochastically, because rounding to "
            "the nearest would drop small updates, and the recipe's optimizer is a function of its "
            "own. Use adamw(), sgd() or muon(), or leave param_dtype out."
        )
    if recipe.exact and not strategy.shards and world_size > 1:
        raise PlanError(
            f"{asked} with exact=true needs strategy=fsdp on several ranks: the exact sums of "
            f"strategy={recipe.strategy} are made in the dtype of the weights. Use strategy=fsdp, "
            "or leave one of them out."
        )


def _check_fp8(recipe: Recipe, strategy: Strategy, machine: Machine, device: str) -> None:
    """Refuse products in fp8 where nothing computes them. Ranks check the generation of their GPU.

    Raises:
        PlanError: A setting contradicts them, or torchao is not installed.
    """
    if device != "cuda":
        raise PlanError(
            "fp8=true needs GPUs of the Ada or Hopper generation or newer, and the plan is for "
            "CPUs. Leave fp8 out."
        )
    if not machine.has_torchao:
        raise PlanError(
            "fp8=true uses torchao, and torchao is not installed. Install it with `python -m pip "
            "install torchao`, or leave fp8 out."
        )
    if recipe.precision != "bf16":
        raise PlanError(
            f"fp8=true computes the products of linear layers in fp8 and all else in bf16, and "
            f"precision={recipe.precision} was asked for. Use precision=bf16, or leave fp8 out."
        )
    if strategy.uses_deepspeed:
        raise PlanError(
            f"fp8=true replaces linear layers by those of torchao, which DeepSpeed's "
            f"strategy={recipe.strategy} does not know. Use strategy=ddp or strategy=fsdp."
        )
