"""Averages of the weights over the steps of a run, as values: a name with arguments.

    ema     an exponential moving average: recent steps count most
    tail    the mean of the weights of the last steps

A rule returns the share of the newest weights in the average. Steps count optimizer updates from 1.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Concatenate, ParamSpec

from msgspec import Meta

from launcher.recipe.callspec import Spec, bind
from launcher.recipe.validation import NonNegativeInt, PositiveInt

P = ParamSpec("P")

PartOfRun = Annotated[float, Meta(ge=0, lt=1)]


@dataclass(frozen=True, repr=False)
class Averaging(Spec):
    """A rule with its arguments, as `ema()` and `tail()` return it."""

    example: ClassVar[str] = "ema()"

    def share(self, count: int) -> float:
        """Return the share of the newest weights in an average that holds `count` others."""
        share: float = self.function(count, **dict(self.arguments)) if count else 1.0
        return share

    def first_step(self, total_steps: int) -> int:
        """Return the first step, counted from 1, whose weights are averaged.

        Args:
            total_steps: Steps of the run. Its last step is always averaged.
        """
        start: float = self._argument("start")
        return min(round(start * total_steps), total_steps - 1) + 1

    @property
    def every(self) -> int:
        """Return the number of steps between two whose weights are averaged."""
        every: int = self._argument("every")
        return every

    def _argument(self, name: str) -> Any:
        default = inspect.signature(self.function).parameters[name].default
        return dict(self.arguments).get(name, default)


AVERAGES: dict[str, Callable[..., Averaging]] = {}
"""The rules by the names that the command line and YAML files use."""


def _register(rule: Callable[Concatenate[int, P], float]) -> Callable[P, Averaging]:
    """Turn a rule `(count, **arguments) -> share` into a maker of `Averaging`s, and register it."""

    @functools.wraps(rule)
    def make(*args: P.args, **kwargs: P.kwargs) -> Averaging:
        return Averaging(rule.__name__, bind(rule, args, kwargs, skip=1), rule)

    signature = inspect.signature(rule)
    make.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[1:]
    )
    AVERAGES[rule.__name__] = make
    return make


@_register
def ema(
    count: int,
    decay: PartOfRun = 0.999,
    *,
    start: PartOfRun = 0.0,
    every: PositiveInt = 1,  # noqa: ARG001
    warmup: NonNegativeInt = 9,
) -> float:
    """Average the weights exponentially, with the share `decay` for what is averaged already.

    The average begins with the weights of its first step. Until it holds many, its decay is
    smaller, so that it forgets these: n / (n + warmup) after n weights. The default is the rule
    (1 + n) / (10 + n) of TensorFlow and timm, which count n from 0; `warmup=0` always uses `decay`.

    Args:
        count: Weights that the average holds, at least 1.
        decay: The part of the average that it keeps when a step's weights enter.
        start: The part of the run after which the average begins.
        every: Steps between the weights that enter the average.
        warmup: How slowly the decay grows.
    """
    del start
    return 1.0 - min(decay, count / (count + warmup))


@_register
def tail(count: int, start: PartOfRun = 0.75, *, every: PositiveInt = 1) -> float:  # noqa: ARG001
    """Average the weights of the last steps uniformly (arXiv:1803.05407).

    Args:
        count: Weights that the average holds, at least 1.
        start: The part of the run after which the average begins.
        every: Steps between the weights that enter the average.
    """
    return 1.0 / (count + 1)
