"""Creates the recipe's optimizer and writes the schedule's values into it."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn
from torch.optim import Optimizer

from launcher.engine.optimizers.named import named_optimizer
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


def left_out_text(optimizer: Optimizer, model: nn.Module) -> str:
    """Return a warning about trained parameters of a model that an optimizer does not update.

    Empty if it updates all of them.
    """
    updated = {id(each) for group in optimizer.param_groups for each in group["params"]}
    trained = [(name, each) for name, each in model.named_parameters() if each.requires_grad]
    names = [name for name, each in trained if id(each) not in updated]
    if not names:
        return ""
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return (
        f"the recipe's optimizer leaves out {len(names)} of {len(trained)} parameters, which stay "
        f"as they are: {names[0]}{more}. Give it model.parameters(), or set requires_grad_(False) "
        "on those that are not to be trained."
    )


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
