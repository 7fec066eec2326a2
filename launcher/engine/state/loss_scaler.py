"""Dynamic loss scaling for fp16."""

from __future__ import annotations

from launcher.runs.manifest import ScalerState

_FIRST_SCALE = 2.0**16
_STEPS_BETWEEN_RISES = 2000
_LEAST_SCALE = 2.0**-14


class LossScaler:
    """The factor that keeps small gradients of a loss above what fp16 rounds to zero.

    Halved, and the step left out, where the gradient overflows; doubled after 2,000 steps without
    (Micikevicius et al., arXiv:1710.03740, with the constants of `torch.amp.GradScaler`). The
    decision is taken on the norm of the global gradient, so it is the same on every rank and under
    every strategy, which `GradScaler` does not promise where gradients are sharded.
    """

    def __init__(self, world_size: int) -> None:
        self.scale = _FIRST_SCALE
        self._world_size = world_size
        self._good_steps = 0

    @property
    def factor(self) -> float:
        """What every loss is multiplied by, and the averaged gradient divided by.

        The loop's weights hold the world size, which averaging over ranks takes out again. Taken
        out here, the gradients of a sample are the same numbers on any number of ranks, and
        overflow on all of them or none.
        """
        return self.scale / self._world_size

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow whatever the scale."""
        return self.scale < _LEAST_SCALE

    def state(self) -> ScalerState:
        """Return what `restore` takes."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def restore(self, state: ScalerState) -> None:
        """Go on as the scaler that returned this state."""
        self.scale, self._good_steps = state["scale"], state["good_steps"]

    def update(self, *, finite: bool) -> None:
        """Take note of a step whose gradient was finite, or not."""
        if not finite:
            self.scale /= 2
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps % _STEPS_BETWEEN_RISES == 0:
            self.scale *= 2
