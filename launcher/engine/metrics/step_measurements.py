"""What the loop measures in a step on one rank; tensors stay on the device until they are read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from launcher.engine.metrics.logged_numbers import Logged
from launcher.planning.stages import Window
from launcher.planning.virtual_ranks import Part


class MicroBatchLoss(NamedTuple):
    """The loss of a micro-batch that has a weight."""

    total: Tensor
    """Sum of the losses of its items: a scalar on the device, without a gradient."""

    num_items: int | Tensor
    """Number of its items."""

    part: Part | None
    """The part of the global batch that it belongs to; None without virtual ranks."""


class TurnMeasurements(NamedTuple):
    """The turn of one objective in a step. A recipe with one loss has one turn in each step."""

    losses: list[MicroBatchLoss]
    """The losses of this rank's micro-batches."""

    lr: float
    """The scheduled learning rate."""

    momentum: float | None
    """The momentum, or the first beta; None if the optimizer has neither."""

    grad_norm: Tensor
    """Norm of the global gradient: a scalar on the device."""

    name: str = ""
    """Name of the objective; empty if the recipe has one loss."""


class StepMeasurements(NamedTuple):
    """A step of this rank."""

    step: int
    """Number of the step, counted from 1."""

    window: Window
    """The global batch of the step."""

    samples: int
    """Samples that all ranks have taken since the start of the run."""

    items: int | Tensor
    """Items of the global batch."""

    data_wait_seconds: float
    """Time that this rank has waited for its samples."""

    main: TurnMeasurements
    """The turn whose loss is that of the step."""

    logged: Logged
    """What the recipe has logged."""

    turns: Sequence[TurnMeasurements] = ()
    """The turns of all objectives in this step; empty if the recipe has one loss."""
