"""Creates the optimizers that recipes name, such as `adamw(state_dtype="bf16")`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, AdamW, Optimizer

from launcher.engine.optimizers.combined import CombinedOptimizer
from launcher.engine.optimizers.eight_bit import EightBitAdamW
from launcher.engine.optimizers.flat import FlatOptimizer
from launcher.engine.optimizers.muon import ShardedMuon, hidden_matrices
from launcher.engine.optimizers.schedule_free import ScheduleFreeAdamW
from launcher.engine.optimizers.small_adamw import SmallAdamW
from launcher.engine.optimizers.small_sgd import SmallSGD
from launcher.errors import RecipeError
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe

_ORTHOGONALIZED_IN = {"fp32": torch.float32, "fp64": torch.float64}
"""The dtype of Muon's matrix products by `Recipe.precision`; bfloat16 in mixed precision."""


_STATE_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.float32}
"""The dtype of the moments of small weights, by the argument `state_dtype` of `adamw`."""


def named_optimizer(recipe: Recipe, model: nn.Module, lr: float) -> Optimizer:
    """Return the optimizer that the recipe names, over the trained parameters of `model`.

    Raises:
        RecipeError: The optimizer cannot train the model's weights.
    """
    spec = recipe.optimizer
    assert isinstance(spec, OptimizerSpec)
    trained = {name: weight for name, weight in model.named_parameters() if weight.requires_grad}
    if spec.name != "muon":
        return _elementwise(spec, recipe, trained, lr)
    arguments = _arguments(spec)
    others_spec, exclude = arguments.pop("others"), arguments.pop("exclude")
    others_lr = lr * arguments.pop("others_lr")
    matrices = hidden_matrices(model, exclude)
    if not matrices:
        raise RecipeError(
            "optimizer=muon() updates the matrices of hidden layers, and the model has none: its "
            "trained weights belong to embeddings, the head, biases and norms. Use adamw()."
        )
    others = {name: weight for name, weight in trained.items() if name not in matrices}
    optimizer = ShardedMuon(
        [{"params": list(matrices.values())}],
        {"lr": lr, **arguments},
        seed=recipe.seed,
        dtype=_ORTHOGONALIZED_IN.get(recipe.precision, torch.bfloat16),
    )
    if not others:
        return optimizer
    return CombinedOptimizer(optimizer, _elementwise(others_spec, recipe, others, others_lr))


def parts_of(optimizer: Optimizer) -> tuple[Optimizer, ...]:
    """Return the optimizers that together take the steps of `optimizer`."""
    return optimizer.parts if isinstance(optimizer, CombinedOptimizer) else (optimizer,)


def is_own(optimizer: Optimizer) -> bool:
    """Return whether an optimizer is one of this package, which skip steps on the device."""
    return isinstance(optimizer, (FlatOptimizer, ShardedMuon))


def _arguments(spec: OptimizerSpec) -> dict[str, Any]:
    """Return all arguments of a named optimizer, with defaults for those that are not given."""
    return {name: spec.argument(name) for name in spec.parameters()}


def _elementwise(
    spec: OptimizerSpec, recipe: Recipe, weights: Mapping[str, nn.Parameter], lr: float
) -> Optimizer:
    """Return an optimizer that treats each element of the weights alike.

    Raises:
        RecipeError: The optimizer cannot train these weights.
    """
    arguments = _arguments(spec)
    groups = _parameter_groups(weights, decay_1d=arguments.pop("decay_1d"))
    are_small = recipe.param_dtype == "bf16"
    if spec.name == "sgd" and are_small:
        _check_real(spec, weights)
        return SmallSGD(groups, {"lr": lr, **arguments}, seed=recipe.seed)
    if spec.name == "sgd":
        arguments |= _kernels(recipe, weights, shards_are_fused=False)
        return SGD(groups, lr=lr, **arguments)
    if spec.name == "schedule_free":
        _check_real(spec, weights)
        return ScheduleFreeAdamW(groups, {"lr": lr, **arguments}, seed=recipe.seed)
    arguments["betas"] = arguments.pop("beta1"), arguments.pop("beta2")
    kept_in = arguments.pop("state_dtype")
    if kept_in == "fp32" and not are_small:
        arguments |= _kernels(recipe, weights, shards_are_fused=True)
        return AdamW(groups, lr=lr, **arguments)
    _check_real(spec, weights)
    defaults = {"lr": lr, **arguments}
    kind = EightBitAdamW if kept_in == "int8" else SmallAdamW
    return kind(groups, defaults, state_dtype=_STATE_DTYPES[kept_in], seed=recipe.seed)


def _check_real(spec: OptimizerSpec, weights: Mapping[str, nn.Parameter]) -> None:
    """Refuse weights that bfloat16 cannot represent.

    Raises:
        RecipeError: A weight is complex.
    """
    for name, weight in weights.items():
        if not weight.is_floating_point():
            raise RecipeError(
                f"optimizer={spec} with small states or weights takes real numbers, and the "
                f"model's {name} is {weight.dtype}. Use adamw() without state_dtype."
            )


def _kernels(
    recipe: Recipe, weights: Mapping[str, nn.Parameter], *, shards_are_fused: bool
) -> dict[str, bool]:
    """Return which of torch's kernels an optimizer of torch uses.

    Fused kernels update all parameters at once; without them torch loops over the parameters on
    CPUs. On CPUs they round the last elements of a tensor otherwise than the others, so that bits
    would depend on the shards.

    Args:
        recipe: Whether its sums are exact.
        weights: The weights, by name.
        shards_are_fused: Whether torch has fused kernels of this optimizer for FSDP's DTensors. It
            has none of SGD, whose shards `take_step` updates itself.
    """
    kinds = (DTensor,) if shards_are_fused else ()
    fused = not recipe.exact and all(
        weight.is_floating_point() and (type(weight) is nn.Parameter or isinstance(weight, kinds))
        for weight in weights.values()
    )
    return {"fused": fused} | ({"foreach": True} if recipe.exact else {})


def _parameter_groups(
    weights: Mapping[str, nn.Parameter], *, decay_1d: bool
) -> list[dict[str, Any]]:
    """Return the trained parameters in groups, with and without weight decay."""
    if decay_1d:
        return [{"params": list(weights.values())}]
    decayed = [weight for weight in weights.values() if weight.ndim > 1]
    undecayed = [weight for weight in weights.values() if weight.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": undecayed, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]
