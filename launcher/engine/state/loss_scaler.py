"""Dynamic loss scaling for fp16."""

from __future__ import annotations

from launcher.runs.manifest import ScalerState

_INITIAL_SCALE = 2.0**16
_GROWTH_INTERVAL = 2000
_MIN_SCALE = 2.0**-14


class LossScaler:
    """A loss scale that keeps small gradients from underflowing in fp16.

    The scale is halved, and the step skipped, when the gradient overflows. It is doubled after
    2,000 steps without overflow (Micikevicius et al., arXiv:1710.03740, with the constants of
    `torch.amp.GradScaler`). The decision depends on the norm of the global gradient, so it is the
    same on every rank and under every strategy. `GradScaler` does not guarantee this for sharded
    gradients.

    Args:
        world_size: The number of ranks.
    """

    def __init__(self, world_size: int) -> None:
        self.scale = _INITIAL_SCALE
        self._world_size = world_size
        self._good_steps = 0

    @property
    def factor(self) -> float:
        """The factor by which every loss is multiplied and the averaged gradient divided.

        The loop's weights include the world size, which averaging over ranks cancels. Dividing by
        it here makes the gradients of a sample equal, and equally prone to overflow, on any number
        of ranks.
        """
        return self.scale / self._world_size

    @property
    def is_exhausted(self) -> bool:
        """Whether gradients overflow even at the minimum scale."""
        return self.scale < _MIN_SCALE

    def state(self) -> ScalerState:
        """Return the state for a checkpoint, as `restore` accepts it."""
        return {"scale": self.scale, "good_steps": self._good_steps}

    def restore(self, state: ScalerState) -> None:
        """Continue from a state that `state` returned."""
        self.scale, self._good_steps = state["scale"], state["good_steps"]

    def update(self, *, finite: bool) -> None:
        """Adjust the scale after a step whose gradient was finite or not."""
        if not finite:
            self.scale /= 2
            self._good_steps = 0
            return
        self._good_steps += 1
        if self._good_steps % _GROWTH_INTERVAL == 0:
            self.scale *= 2
