"""Measurements of steps as the training loop takes them, without a training."""

from __future__ import annotations

import torch
from torch import Tensor

from launcher.engine.metrics.step_measurements import (
    MicroBatchLoss,
    StepMeasurements,
    TurnMeasurements,
)
from launcher.planning.stages import Window


def measured_step(
    step: int, *, samples: int = 64, items: int | Tensor = 64, losses: list[MicroBatchLoss]
) -> StepMeasurements:
    """Return the measurements of a step in the first epoch whose samples are those of a batch.

    Args:
        step: The step, counted from 1.
        samples: Samples of the global batch.
        items: Items of the global batch.
        losses: The losses of its micro-batches.
    """
    grad_norm = torch.ones((), device=losses[0].total.device)
    return StepMeasurements(
        step=step,
        window=Window(0, samples * (step - 1), samples),
        samples=samples * step,
        items=items,
        data_wait_seconds=0.0,
        main=TurnMeasurements(losses, lr=0.1, momentum=None, grad_norm=grad_norm),
        logged={},
    )
