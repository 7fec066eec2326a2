"""The recipe's optimizer, made; and the schedule's numbers, written into it."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from launcher.errors import RecipeError
from launcher.optimizer import OptimizerSpec
from launcher.recipe import Recipe
from launcher.schedule import Setting


def make_optimizer(recipe: Recipe, model: nn.Module, lr: float) -> Optimizer:
    """Return the recipe's optimizer over the parameters of `model` that are trained.

    Args:
        recipe: Names the optimizer, or holds a function that makes it.
        model: Its parameters are on their device.
        lr: The peak learning rate; groups made with another keep their ratio to it.

    Raises:
        RecipeError: The function returned no optimizer.
    """
    if not isinstance(recipe.optimizer, OptimizerSpec):
        made = recipe.optimizer(model, lr)
        if not isinstance(made, Optimizer):
            raise RecipeError(
                f"The recipe's optimizer function returned {type(made).__name__}, not a "
                "torch.optim.Optimizer."
            )
        return made
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    arguments: dict[str, Any] = dict(recipe.optimizer.arguments)
    if recipe.optimizer.name == "sgd":
        arguments.setdefault("momentum", 0.9)
        return SGD(trained, lr=lr, **arguments)
    betas = (arguments.pop("beta1", 0.9), arguments.pop("beta2", 0.999))
    return AdamW(trained, lr=lr, betas=betas, **arguments)


class Hyperparameters:
    """Writes the schedule's numbers into an optimizer's parameter groups.

    Args:
        optimizer: Freshly made, its groups at their peak learning rates.
        peak_lr: The plan's peak learning rate.
    """

    def __init__(self, optimizer: Optimizer, peak_lr: float) -> None:
        self._peak_lr = peak_lr
        self._groups = [(group, group["lr"] / peak_lr) for group in optimizer.param_groups]

    def write(self, setting: Setting) -> float:
        """Set learning rate and momentum of the coming step; return the learning rate."""
        lr = self._peak_lr * setting.factor
        for group, ratio in self._groups:
            group["lr"] = lr * ratio
            if setting.momentum is not None:
                if "momentum" in group:
                    group["momentum"] = setting.momentum
                elif "betas" in group:
                    group["betas"] = (setting.momentum, *group["betas"][1:])
        return lr
