"""Optimizers that the loop or a strategy cannot use, refused with what to use instead."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import nn
from torch.optim import SGD, Adagrad, Optimizer, SparseAdam

from launcher.engine.state.update_rules import updates_elements_alone, updates_shards
from launcher.errors import RecipeError
from launcher.planning.strategy import STRATEGIES
from launcher.printable import kind_of

_STRATEGIES = {
    "Adafactor": "ddp",
    "Muon": "ddp or fsdp",
    "SparseAdam": "ddp",
    "Rprop": "ddp, zero1, zero2 or zero3",
}
"""The strategies under which the optimizers of torch train that do not train under all of them.

Under FSDP, torch's operations on sharded tensors lack what Adafactor and Rprop do in place. Under
ZeRO, an optimizer updates pieces of flattened weights and loses their shape. Recipes' muon() is
another Muon, which trains under every strategy.
"""


def check_optimizer_kind(optimizer: Any) -> None:
    """Refuse what is not an optimizer, computes the loss itself, or chooses its learning rate.

    Args:
        optimizer: What the recipe's optimizer function returned.

    Raises:
        RecipeError: The loop cannot use it.
    """
    kind = type(optimizer).__name__
    if not isinstance(optimizer, Optimizer):
        several = (
            " Several optimizers belong to several objectives: Recipe(objectives=...) in place of "
            "loss and optimizer, each with its parameters."
            if isinstance(optimizer, (list, tuple, dict))
            else ""
        )
        raise RecipeError(
            f"The recipe's optimizer function returned {kind_of(optimizer)}; expected a "
            f"torch.optim.Optimizer.{several}"
        )
    if needs_closure(optimizer):
        raise RecipeError(
            f"The recipe's optimizer is {kind}, whose step() computes the loss itself, several "
            "times per step, but a step here computes it once. Use sgd(), adamw() or another "
            "optimizer whose step() needs no closure."
        )
    for number, group in enumerate(optimizer.param_groups):
        if group.get("lr") is None:
            raise RecipeError(
                f"The recipe's optimizer is {kind}, whose parameter group {number} has no learning "
                "rate (lr=None), but launcher's schedule writes one in each step. Pass the second "
                "argument of the optimizer function on, as in Adafactor(model.parameters(), lr=lr, "
                "relative_step=False)."
            )


def needs_closure(optimizer: Optimizer) -> bool:
    """Return whether `step` must be given a closure that computes the loss, as by LBFGS."""
    try:
        inspect.signature(type(optimizer).step).bind(optimizer)
    except TypeError:
        return True
    except ValueError:  # it has no signature that can be read
        return False
    return False


def check_sparse_support(optimizer: Optimizer, sparse: Mapping[str, nn.Parameter]) -> None:
    """Refuse torch's optimizers that cannot train sparse, or dense, gradients.

    Args:
        optimizer: The optimizer.
        sparse: The parameters with sparse gradients, by name.

    Raises:
        RecipeError: The optimizer would fail in its first step, or keep sparse state.
    """
    kind = type(optimizer).__name__
    if not type(optimizer).__module__.startswith("torch.optim"):
        return
    parameters = {p for group in optimizer.param_groups for p in group["params"]}
    name = next((name for name, parameter in sparse.items() if parameter in parameters), None)
    if isinstance(optimizer, SparseAdam):
        if parameters - set(sparse.values()):
            raise RecipeError(
                "The recipe's optimizer is SparseAdam, which takes sparse gradients only, but it "
                "has parameters with dense gradients. Use torch.optim.SGD or torch.optim.Adagrad, "
                "which take both, or leave sparse=True out of the embeddings and use adamw()."
            )
        return
    has_momentum = isinstance(optimizer, SGD) and any(g["momentum"] for g in optimizer.param_groups)
    if name is not None and (has_momentum or not isinstance(optimizer, (SGD, Adagrad))):
        shown = f"{kind} with momentum" if has_momentum else kind
        raise RecipeError(
            f"The recipe's optimizer is {shown}, which takes dense gradients only, but the "
            f"gradients of {name} are sparse, because of Embedding(sparse=True). Leave sparse=True "
            "out, or use torch.optim.SGD without momentum or torch.optim.Adagrad."
        )


def check_strategy_of(optimizer: Optimizer, strategy: str) -> None:
    """Refuse an optimizer that does not train under a strategy that shards (collective).

    Args:
        optimizer: The optimizer.
        strategy: The name of the strategy.

    Raises:
        RecipeError: The optimizer would fail, or compute something else.
    """
    kind = type(optimizer).__name__
    if STRATEGIES[strategy].uses_deepspeed and hasattr(optimizer, "eval"):
        raise RecipeError(
            f"The recipe's optimizer is {kind}, which evaluates other weights than it trains, and "
            f"under strategy={strategy} it would replace them in DeepSpeed's copy alone. Use "
            "strategy=ddp or fsdp."
        )
    if STRATEGIES[strategy].uses_deepspeed and not updates_elements_alone(optimizer):
        raise RecipeError(
            f"The recipe's optimizer is {kind}, which updates an element of a weight by others as "
            f"well, as by the norm of the weight. Under strategy={strategy} it would have pieces "
            "of flattened weights, so that its steps would depend on the number of ranks. Use "
            "strategy=ddp or fsdp."
        )
    if not updates_shards(optimizer):
        raise RecipeError(
            f"The recipe's optimizer is {kind}, which updates weights that strategy={strategy} has "
            "split over ranks otherwise than whole ones: it reads numbers, such as a norm, from "
            "the part of a rank. Use strategy=ddp, or let it compute with tensors in place of "
            "item() and float()."
        )
    strategies = _STRATEGIES.get(kind)
    if strategies is None or strategy in strategies.replace(",", "").split():
        return
    raise RecipeError(
        f"The recipe's optimizer is {kind}, which cannot update weights that "
        f"strategy={strategy} has split over ranks. Use strategy={strategies}, or an optimizer "
        "that trains under every strategy, such as adamw() or sgd()."
    )
