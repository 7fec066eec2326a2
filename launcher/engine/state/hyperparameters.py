"""Creates the recipe's optimizer and writes the schedule's values into it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from launcher.engine.optimizers.named import is_own, named_optimizer, parts_of
from launcher.engine.state.optimizer_kinds import check_optimizer_kind, check_sparse_support
from launcher.engine.state.parameter_kinds import sparse_parameters
from launcher.errors import RecipeError
from launcher.recipe.function_checks import note_call
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe
from launcher.recipe.schedules import ScheduleValue

SCHEDULED = ("lr", "momentum", "betas")
"""Keys of parameter groups that `Hyperparameters` writes."""


def make_optimizer(recipe: Recipe, model: nn.Module, lr: float) -> Optimizer:
    """Return the recipe's optimizer over the trained parameters of `model`.

    Args:
        recipe: The recipe, which names the optimizer or holds a function that returns it.
        model: The model, whose parameters are on their device.
        lr: The peak learning rate. Parameter groups with another rate keep their ratio to it.

    Raises:
        RecipeError: The function did not return an optimizer, or returned one that the loop cannot
            use or that cannot train the model's parameters.
    """
    sparse = sparse_parameters(model)
    if not isinstance(recipe.optimizer, OptimizerSpec):
        try:
            optimizer = recipe.optimizer(model, lr)
        except Exception as error:
            name, kind = "The recipe's optimizer function", type(model).__name__
            note_call(error, name, model=kind, lr=f"{lr:g}")
            raise
        check_optimizer_kind(optimizer)
        check_sparse_support(optimizer, sparse)
        _check_parameters(optimizer, model)
        return optimizer
    if sparse:
        raise RecipeError(
            f"The recipe's optimizer is {recipe.optimizer.name}(...), which takes dense gradients, "
            f"but the gradients of {next(iter(sparse))} are sparse, because of "
            "Embedding(sparse=True). Leave sparse=True out, or let the recipe's optimizer be a "
            "function that returns torch.optim.SGD or torch.optim.Adagrad."
        )
    return named_optimizer(recipe, model, lr)


def _check_parameters(optimizer: Optimizer, model: nn.Module) -> None:
    """Refuse an optimizer over tensors that are not parameters of the model.

    No strategy would sum their gradients over ranks, and no checkpoint would hold them.

    Raises:
        RecipeError: It updates another tensor.
    """
    known = {id(parameter) for parameter in model.parameters()}
    updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    others = [tuple(parameter.shape) for parameter in updated if id(parameter) not in known]
    if others:
        raise RecipeError(
            f"The recipe's optimizer updates {len(others)} of {len(updated)} tensors that are not "
            f"parameters of the model, the first of shape {others[0]}. Let the optimizer function "
            "take them from the model that it is called with, as in model.parameters(), and make "
            "further parameters attributes of the model."
        )


def take_step(optimizer: Optimizer, recipe: Recipe, finite: bool | Tensor) -> None:
    """Update the parameters if the gradient is `finite`.

    Fused kernels read a `finite` tensor on the device. For other optimizers of recipes' own
    functions, and for weights that fused kernels do not take, the host waits for its value, because
    it decides whether to call `step`. A step that creates the optimizer's state also waits, because
    fused SGD would keep an uninitialised momentum buffer if it skipped that step (torch 2.13).

    torch wraps `step` in a profiler range, hooks and a graph break, which together take 50 us, more
    than a step of a small network. Optimizers that `make_optimizer` creates have no hooks, so their
    unwrapped function is called.

    Args:
        optimizer: The optimizer, whose parameters have gradients.
        recipe: The recipe from which `make_optimizer` created it.
        finite: Whether the gradient is finite: a bool, or a scalar tensor on the device.
    """
    if not isinstance(recipe.optimizer, OptimizerSpec):
        if isinstance(finite, Tensor) and _skips_on_device(optimizer):
            _step_unless(optimizer, finite.logical_not().float())
        elif bool(finite):
            optimizer.step()
        return
    with torch.no_grad():
        for part in parts_of(optimizer):
            _take_named_step(part, finite)


def _take_named_step(optimizer: Optimizer, finite: bool | Tensor) -> None:
    """Take a step with an optimizer that `make_optimizer` created, if the gradient is `finite`."""
    if isinstance(finite, Tensor) and (_has_state(optimizer) or is_own(optimizer)):
        found_inf = finite.logical_not().float()
        if is_own(optimizer) or optimizer.param_groups[0]["fused"]:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        elif _has_float_shards(optimizer):
            _step_shards(optimizer, found_inf)
            return
        elif not bool(finite):
            return
    elif not bool(finite):
        return
    _unwrapped_step(type(optimizer).step)(optimizer)


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether a recipe's own optimizer skips a step by a number on the device.

    torch's fused optimizers do, and others that tell `torch.amp.GradScaler` so. Hooks of `step`
    would run in skipped steps as well, so with hooks the host decides.
    """
    groups = optimizer.param_groups
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused", True) for group in groups)
        and not optimizer._optimizer_step_pre_hooks  # noqa: SLF001
        and not optimizer._optimizer_step_post_hooks  # noqa: SLF001
        and all(
            optimizer.state.get(parameter) or not group.get("momentum", True)
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        )
    )


def _step_unless(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Call `step`, which changes nothing if `found_inf` is 1, as `torch.amp.GradScaler` does."""
    attributes: Any = optimizer
    attributes.grad_scale, attributes.found_inf = None, found_inf
    try:
        optimizer.step()
    finally:
        del attributes.grad_scale, attributes.found_inf


def _has_state(optimizer: Optimizer) -> bool:
    """Return whether a step creates no more state: SGD without momentum has none at all."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return any(optimizer.state.get(weight) for weight in weights) or not any(
        group.get("momentum", True) for group in optimizer.param_groups
    )


def _has_float_shards(optimizer: Optimizer) -> bool:
    """Return whether `_step_shards` can take the step: SGD whose weights are DTensors of floats."""
    return isinstance(optimizer, SGD) and all(
        isinstance(parameter, DTensor) and parameter.is_floating_point()
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


def _step_shards(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Take a step of SGD with the fused kernel on this rank's shards of the weights.

    Args:
        optimizer: An SGD over FSDP's DTensors that has its momentum buffers.
        found_inf: A scalar tensor on the device, 1 to skip the step.
    """
    for group in optimizer.param_groups:
        used = [p for p in group["params"] if p.grad is not None and p.to_local().numel()]
        if not used:  # all shards of this rank are empty, and the kernel looks at the first one
            continue
        momentum = group["momentum"]
        buffers = [optimizer.state[p]["momentum_buffer"] for p in used] if momentum else []
        torch._fused_sgd_(
            [p.to_local() for p in used],
            [p.grad.to_local() for p in used],
            [buffer.to_local() for buffer in buffers],
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
            found_inf=found_inf,
        )


@functools.cache
def _unwrapped_step(step: Callable[..., Any]) -> Callable[[Optimizer], None]:
    return inspect.unwrap(step)


class WrittenHyperparameters(NamedTuple):
    """The scheduled values with which an optimizer takes a step."""

    lr: float
    """The learning rate of the recipe, before the ratios of parameter groups."""

    momentum: float | None
    """The momentum, or the first beta, of the first parameter group; None if it has neither."""


class Hyperparameters:
    """Writes the schedule's values into an optimizer's parameter groups.

    Args:
        optimizer: A new optimizer, whose groups have their peak learning rates.
        peak_lr: The plan's peak learning rate.
    """

    def __init__(self, optimizer: Optimizer, peak_lr: float) -> None:
        self._peak_lr = peak_lr
        self._groups = [(group, group["lr"] / peak_lr) for group in optimizer.param_groups]

    def write(self, setting: ScheduleValue) -> WrittenHyperparameters:
        """Set the learning rate and momentum of the coming step, and return them."""
        lr = self._peak_lr * setting.factor
        for group, ratio in self._groups:
            group["lr"] = lr * ratio
            if setting.momentum is not None:
                if "momentum" in group:
                    group["momentum"] = setting.momentum
                elif "betas" in group:
                    group["betas"] = (setting.momentum, *group["betas"][1:])
        first_group = self._groups[0][0]
        return WrittenHyperparameters(
            lr, first_group["betas"][0] if "betas" in first_group else first_group.get("momentum")
        )
