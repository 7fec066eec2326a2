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
        norm = 0.0 if self.grad_norm is None else self.grad_norm
        return math.isfinite(self.loss) and math.isfinite(norm)
