"""Dynamic loss scaling for fp16."""

from __future__ import annotations

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

    def __init__(self) -> None:
        self.scale = _FIRST_SCALE
        self._good_steps = 0

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow whatever the scale."""
        return self.scale < _LEAST_SCALE

    def update(self, *, finite: bool) -> None:
        """Take note of a step whose gradient was finite, or not."""
        if not finite:
            self.scale /= 2
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps % _STEPS_BETWEEN_RISES == 0:
            self.scale *= 2
