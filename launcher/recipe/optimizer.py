"""Optimizers as values: a name with arguments, without importing torch.

A recipe's `optimizer` is `sgd(...)`, `adamw(...)`, `muon(...)`, or any function
`(model, lr) -> torch.optim.Optimizer`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, ParamSpec

from msgspec import Meta

from launcher.errors import UsageError
from launcher.recipe.callspec import Spec, bind
from launcher.recipe.validation import Fraction, NonNegativeFloat, PositiveFloat, PositiveInt

P = ParamSpec("P")

Beta = Annotated[float, Meta(gt=0, le=1)]


@dataclass(frozen=True, repr=False)
class OptimizerSpec(Spec):
    """An optimizer with its arguments, as `sgd()`, `adamw()` and `muon()` return it."""

    example: ClassVar[str] = "sgd()"

    def __post_init__(self) -> None:
        others = self.argument("others")
        if isinstance(others, OptimizerSpec) and others.name not in ("adamw", "sgd"):
            raise UsageError(
                f"{self.name}(others={others.name}()): the other weights need an optimizer for "
                "weights of any shape: adamw() or sgd()."
            )

    def argument(self, name: str) -> Any:
        """Return an argument as it was given, or its default; None if there is no such argument."""
        return dict(self.arguments).get(name, self.parameters().get(name))

    def parameters(self) -> dict[str, Any]:
        """Return the names of all arguments with their defaults."""
        signature = inspect.signature(self.function).parameters
        return {name: parameter.default for name, parameter in signature.items()}

    @property
    def adaptive(self) -> bool:
        """Return whether the optimizer divides gradients by their scale, as Adam does."""
        return self.name != "sgd"

    @property
    def needs_shapes(self) -> str | None:
        """What the optimizer does with the shape of a weight or the place of an element in it.

        DeepSpeed gives an optimizer pieces of weights in one flat tensor. None if these suffice, as
        for Muon, whose ranks exchange the pieces of a matrix.
        """
        if isinstance(others := self.argument("others"), OptimizerSpec):
            return others.needs_shapes
        if self.name == "schedule_free":
            return "replaces the weights by their averages in evaluations"
        if self.argument("state_dtype") == "int8":
            return "scales blocks within the rows of a weight"
        if self.argument("state_dtype") == "bf16":
            return "rounds each element by random bits that belong to its place in its weight"
        return None


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
    state_dtype: Literal["fp32", "bf16", "int8"] = "fp32",
) -> None:
    """Adam with decoupled weight decay (`torch.optim.AdamW`; arXiv:1711.05101).

    With `decay_1d=False`, one-dimensional parameters (biases, scales of norms) have no weight
    decay. `state_dtype="bf16"` keeps both moments in bfloat16, which halves their memory; they are
    rounded stochastically. `"int8"` keeps those of large weights in 8 bits, with a scale for every
    256 elements of a row (arXiv:2110.02861).
    """


@_register
def schedule_free(
    *,
    beta1: Beta = 0.9,
    beta2: Fraction = 0.999,
    eps: PositiveFloat = 1e-8,
    weight_decay: NonNegativeFloat = 0.01,
    decay_1d: bool = True,
) -> None:
    """AdamW that averages weights in place of decaying the learning rate (arXiv:2405.15682).

    Use it with `schedule=warmup(constant())` and a learning rate of 1 to 10 times that of AdamW.
    Evaluations and the final weights are of the averages. A schedule's momentum is not used.
    """


OTHERS = adamw()
"""The optimizer of the weights that Muon leaves to another one."""


@_register
def muon(
    *,
    momentum: Fraction = 0.95,
    nesterov: bool = True,
    weight_decay: NonNegativeFloat = 0.1,
    steps: PositiveInt = 5,
    adjust: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
    others: OptimizerSpec = OTHERS,
    others_lr: PositiveFloat = 1.0,
    exclude: tuple[str, ...] = (),
) -> None:
    """Muon for the matrices of hidden layers, and `others` for all other weights.

    Muon orthogonalises the momentum of each matrix by `steps` iterations (Jordan 2024, as in
    `torch.optim.Muon`). Kernels of convolutions count as matrices. Embeddings, the head, biases,
    norms, and weights whose names match a pattern in `exclude`, such as `"*.router.weight"`, are
    updated by `others`. With `adjust="match_rms_adamw"` an update of a matrix is as large as one of
    AdamW (arXiv:2502.16982), so that a learning rate tuned for AdamW suits both; `"original"` is
    the rule of Jordan's article, whose learning rates are around 0.02. `others_lr` is the learning
    rate of the other weights as a multiple of the recipe's.
    """
