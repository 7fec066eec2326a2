"""Optimizers as values: a name with arguments, without importing torch.

A recipe's `optimizer` is `sgd(...)`, `adamw(...)`, or any function
`(model, lr) -> torch.optim.Optimizer`.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, ParamSpec

from launcher.recipe.callspec import Spec, bind
from launcher.recipe.validation import Fraction, NonNegativeFloat, PositiveFloat

P = ParamSpec("P")


@dataclass(frozen=True, repr=False)
class OptimizerSpec(Spec):
    """An optimizer of torch.optim with its arguments, as `sgd()` and `adamw()` return it."""

    example: ClassVar[str] = "sgd()"

    @property
    def adaptive(self) -> bool:
        """Return whether the optimizer divides gradients by their scale, as Adam does."""
        return self.name == "adamw"


OPTIMIZERS: dict[str, Callable[..., OptimizerSpec]] = {}
"""The optimizers by the names that the command line and YAML files use."""


def _register(signature: Callable[P, None]) -> Callable[P, OptimizerSpec]:
    @functools.wraps(signature)
    def make(*args: P.args, **kwargs: P.kwargs) -> OptimizerSpec:
        return OptimizerSpec(signature.__name__, bind(signature, args, kwargs), signature)

    OPTIMIZERS[signature.__name__] = make
    return make


@_register
def sgd(
    *,
    momentum: Fraction = 0.9,
    weight_decay: NonNegativeFloat = 0.0,
    nesterov: bool = False,
    decay_1d: bool = True,
) -> None:
    """Stochastic gradient descent with momentum (`torch.optim.SGD`).

    With `decay_1d=False`, one-dimensional parameters (biases, scales of norms) have no weight
    decay.
    """


@_register
def adamw(
    *,
    beta1: Fraction = 0.9,
    beta2: Fraction = 0.999,
    eps: PositiveFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
    decay_1d: bool = True,
) -> None:
    """Adam with decoupled weight decay (`torch.optim.AdamW`; arXiv:1711.05101).

    With `decay_1d=False`, one-dimensional parameters (biases, scales of norms) have no weight
    decay.
    """
