"""Dynamic loss scaling for fp16."""

from __future__ import annotations

import torch
from torch import Tensor

from launcher.runs.manifest import ScalerState

_INITIAL_SCALE = 2.0**16
_GROWTH_FACTOR, _BACKOFF_FACTOR = 2.0, 0.5
_GROWTH_INTERVAL = 2000
_MIN_SCALE = 2.0**-14


class LossScaler:
    """A loss scale that keeps small gradients from underflowing in fp16.

    The scale is halved, and the step skipped, when the gradient overflows. It is doubled after
    2,000 steps without overflow (Micikevicius et al., arXiv:1710.03740, with the constants of
    `torch.amp.GradScaler`). The decision depends on the norm of the global gradient, so it is the
    same on every rank and under every strategy. `GradScaler` does not guarantee this for sharded
    gradients.

    The scale stays on the device that computes the norm, so the host does not wait for the norm.

    Args:
        world_size: The number of ranks.
        device: The device of the norm of the gradient.
    """

    def __init__(self, world_size: int, device: torch.device) -> None:
        self._world_size = world_size
        self._is_on_host = device.type == "cpu"
        self.scale = torch.full((), _INITIAL_SCALE, dtype=torch.float32, device=device)
        """The scale, a float32 scalar on the device."""
        self._good_steps = torch.zeros((), dtype=torch.int32, device=device)

    @property
    def factor(self) -> float | Tensor:
        """The factor by which every loss is multiplied and the averaged gradient divided.

        The loop's weights include the world size, which averaging over ranks cancels. Dividing by
        it here makes the gradients of a sample equal, and equally prone to overflow, on any number
        of ranks. The factor is a number if the scale is on the host, and a float64 scalar on the
        device otherwise.
        """
        if self._is_on_host:
            return float(self.scale) / self._world_size
        return self.scale.double() / self._world_size

    @staticmethod
    def is_exhausted(scale: float) -> bool:
        """Return whether a scale is below the minimum, at which gradients must not overflow."""
        return scale < _MIN_SCALE

    def unscale(self, grads: list[Tensor], norm: Tensor) -> Tensor:
        """Divide gradients by the factor in place; return their norm, divided likewise."""
        factor = self.factor
        inverse = 1 / factor
        if isinstance(factor, Tensor) and isinstance(inverse, Tensor):
            inverse, factor = inverse.to(norm.dtype), factor.to(norm.dtype)
        torch._foreach_mul_(grads, inverse)
        return norm / factor

    def update(self, finite: Tensor) -> None:
        """Adjust the scale after a step.

        Args:
            finite: Whether the gradient of the step is finite, as a scalar on the device.
        """
        torch._amp_update_scale_(
            self.scale,
            self._good_steps,
            finite.logical_not().float(),
            _GROWTH_FACTOR,
            _BACKOFF_FACTOR,
            _GROWTH_INTERVAL,
        )

    def state(self) -> ScalerState:
        """Return the state for a checkpoint, as `restore` accepts it; waits for the device."""
        return {"scale": float(self.scale), "good_steps": int(self._good_steps)}

    def restore(self, state: ScalerState) -> None:
        """Continue from a state that `state` returned."""
        self.scale.fill_(state["scale"])
        # Earlier versions of launcher counted on after a growth.
        self._good_steps.fill_(state["good_steps"] % _GROWTH_INTERVAL)
