"""The lines of metrics.jsonl that are about one optimizer step each."""

from __future__ import annotations

import math
from typing import Any

import msgspec
from msgspec import Struct

LOGGED = "train/"
"""How the keys of numbers begin that a recipe has logged while it trained."""


class StepRow(Struct, frozen=True, kw_only=True, omit_defaults=True):
    """One optimizer step in metrics.jsonl."""

    step: int
    """Number of steps taken, this one included."""

    epoch: int
    """Epoch of the step, counted from 1."""

    samples: int
    """Training samples consumed since the start of the run, this step included."""

    loss: float
    """Mean loss over the items of the global batch."""

    time: float
    """End of the step on rank 0's clock, in seconds since 1970."""

    lr: float
    momentum: float | None
    """Momentum of the optimizer, or the first beta of Adam; None if it has neither."""

    items: int
    """Number of items in the global batch that the loss counts: samples, or what `Recipe.count`
    returns."""

    grad_norm: float | None
    """Norm of the gradient of the global batch before clipping; None if the gradient overflowed in
    fp16 and the step was skipped."""

    samples_per_second: float
    """Throughput over all ranks, averaged over the steps read together with this one."""

    step_seconds: float
    """Duration of a step, averaged over the steps read together with this one."""

    data_wait_seconds: float
    """Time spent waiting for data in this step, averaged over ranks."""

    communication_seconds: float | None
    """Time spent waiting for communication that overlaps no computation, averaged over ranks and
    over the steps read together with this one; None where it cannot be measured (FSDP, ZeRO)."""

    logged: dict[str, float] = {}  # msgspec makes a new one for each row
    """Means over the global batch of what the recipe has logged in this step, by name."""

    def flat(self) -> StepRow | dict[str, Any]:
        """Return the row as it is written: logged numbers stand beside others, as `train/NAME`."""
        if not self.logged:
            return self
        values = msgspec.structs.asdict(self)
        return values | {f"{LOGGED}{name}": mean for name, mean in values.pop("logged").items()}

    @property
    def is_finite(self) -> bool:
        """Whether the loss and the gradient norm are finite; an overflow in fp16 is tolerated."""
        return _are_finite(self.loss, self.grad_norm)

    def problem(self) -> str:
        """Return what is wrong with a step that is not finite, as the start of a sentence."""
        return _problem("", self.loss, self.grad_norm, self.lr)


class ObjectiveRow(Struct, frozen=True, kw_only=True):
    """The turn of one objective in a step."""

    loss: float
    """Mean loss over the items of the global batch."""

    lr: float
    grad_norm: float | None
    """Norm of the gradient of its parameters before clipping; None after an overflow in fp16."""


class ObjectivesRow(StepRow, frozen=True, kw_only=True):
    """A step of a recipe with several objectives.

    Loss, learning rate, momentum and gradient norm of the step are those of the first objective
    that takes a turn in every step.
    """

    objectives: dict[str, ObjectiveRow]
    """The turns of the step, by the names of the objectives that took one."""

    def flat(self) -> dict[str, Any]:
        """Return the row as it is written: those of the turns are `train/OBJECTIVE/NAME`."""
        values = msgspec.structs.asdict(self)
        numbers = self.numbers_of_turns() | values.pop("logged")
        del values["objectives"]
        return values | {f"{LOGGED}{name}": number for name, number in numbers.items()}

    def numbers_of_turns(self) -> dict[str, float | None]:
        """Return loss, learning rate and gradient norm of each turn, as `OBJECTIVE/NAME`."""
        return {
            f"{name}/{key}": value
            for name, turn in self.objectives.items()
            for key, value in msgspec.structs.asdict(turn).items()
        }

    @property
    def is_finite(self) -> bool:
        """Whether the losses and gradient norms of all turns are finite."""
        return all(_are_finite(turn.loss, turn.grad_norm) for turn in self.objectives.values())

    def problem(self) -> str:
        """Return what is wrong with the first turn that is not finite, likewise."""
        name, turn = next(
            (name, turn)
            for name, turn in self.objectives.items()
            if not _are_finite(turn.loss, turn.grad_norm)
        )
        return _problem(f" of the objective {name}", turn.loss, turn.grad_norm, turn.lr)


def _are_finite(loss: float, grad_norm: float | None) -> bool:
    return math.isfinite(loss) and math.isfinite(grad_norm or 0.0)


def _problem(whose: str, loss: float, grad_norm: float | None, lr: float) -> str:
    return (
        f"the loss{whose} is {loss} and the gradient norm is {grad_norm}, with learning rate "
        f"{lr:.4g}"
    )
