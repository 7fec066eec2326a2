"""The recipe's optimizer, made; and the schedule's numbers, written into it."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from launcher.errors import RecipeError
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe
from launcher.recipe.schedules import ScheduleValue

SCHEDULED = ("lr", "momentum", "betas")
"""What `Hyperparameters` writes into parameter groups."""


def make_optimizer(recipe: Recipe, model: nn.Module, lr: float) -> Optimizer:
    """Return the recipe's optimizer over the parameters of `model` that are trained.

    Args:
        recipe: Names the optimizer, or holds a function that makes it.
        model: Its parameters are on their device.
        lr: The peak learning rate; groups made with another keep their ratio to it.

    Raises:
        RecipeError: The function returned no optimizer, or one that computes losses itself.
    """
    if not isinstance(recipe.optimizer, OptimizerSpec):
        made = recipe.optimizer(model, lr)
        if not isinstance(made, Optimizer):
            raise RecipeError(
                f"The recipe's optimizer function returned {type(made).__name__}, not a "
                "torch.optim.Optimizer."
            )
        if isinstance(made, LBFGS):
            raise RecipeError(
                "The recipe's optimizer is LBFGS, which computes the loss several times in a "
                "step, and a step here is one batch. Use sgd(), adamw() or another optimizer."
            )
        return made
    arguments: dict[str, Any] = dict(recipe.optimizer.arguments)
    groups = _groups(model, decay_1d=arguments.pop("decay_1d", True))
    # One kernel over all parameters; without it torch goes through them one by one on CPUs. Shards
    # of FSDP are of another type, for which torch has no fused SGD; it takes foreach on GPUs.
    arguments["fused"] = all(
        type(parameter) is nn.Parameter and parameter.is_floating_point()
        for group in groups
        for parameter in group["params"]
    )
    if recipe.optimizer.name == "sgd":
        arguments.setdefault("momentum", 0.9)
        return SGD(groups, lr=lr, **arguments)
    betas = (arguments.pop("beta1", 0.9), arguments.pop("beta2", 0.999))
    return AdamW(groups, lr=lr, betas=betas, **arguments)


def _groups(model: nn.Module, *, decay_1d: bool) -> list[dict[str, Any]]:
    """Return the trained parameters as groups, by whether the weight decay is for them."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if decay_1d:
        return [{"params": trained}]
    decayed = [parameter for parameter in trained if parameter.ndim > 1]
    others = [parameter for parameter in trained if parameter.ndim <= 1]
    groups: list[dict[str, Any]] = [{"params": decayed}, {"params": others, "weight_decay": 0.0}]
    return [group for group in groups if group["params"]]


def take_step(optimizer: Optimizer, recipe: Recipe, finite: bool | Tensor) -> None:
    """Update the parameters if the gradient is `finite`, which may be known on the device alone.

    Fused kernels look at it there; for all others the host waits until it is known. They do not
    look where they have no state yet: SGD would keep momentum that nobody has written (torch 2.13).

    torch wraps `step` in a range for its profiler, hooks and a graph break, 50 us together, more
    than the step of a small net. An optimizer that we made has no hooks, and is called below them.
    """
    if not isinstance(recipe.optimizer, OptimizerSpec):
        if bool(finite):
            optimizer.step()
        return
    if isinstance(finite, Tensor) and optimizer.param_groups[0]["fused"] and optimizer.state:
        optimizer.found_inf = finite.logical_not().float()  # type: ignore[attr-defined]
    elif not bool(finite):
        return
    with torch.no_grad():
        _bare_step(type(optimizer).step)(optimizer)


@functools.cache
def _bare_step(step: Callable[..., Any]) -> Callable[[Optimizer], None]:
    return inspect.unwrap(step)


class WrittenHyperparameters(NamedTuple):
    """What an optimizer takes a step with."""

    lr: float
    momentum: float | None
    """Of its first group, or that group's first beta; None where it has none."""


class Hyperparameters:
    """Writes the schedule's numbers into an optimizer's parameter groups.

    Args:
        optimizer: Freshly made, its groups at their peak learning rates.
        peak_lr: The plan's peak learning rate.
    """

    def __init__(self, optimizer: Optimizer, peak_lr: float) -> None:
        self._peak_lr = peak_lr
        self._groups = [(group, group["lr"] / peak_lr) for group in optimizer.param_groups]

    def write(self, setting: ScheduleValue) -> WrittenHyperparameters:
        """Set learning rate and momentum of the coming step; return what they are."""
        lr = self._peak_lr * setting.factor
        for group, ratio in self._groups:
            group["lr"] = lr * ratio
            if setting.momentum is not None:
                if "momentum" in group:
                    group["momentum"] = setting.momentum
                elif "betas" in group:
                    group["betas"] = (setting.momentum, *group["betas"][1:])
        first = self._groups[0][0]
        return WrittenHyperparameters(
            lr, first["betas"][0] if "betas" in first else first.get("momentum")
        )
