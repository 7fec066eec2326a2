"""The seam between the training loop and the way in which ranks work together."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.engine.placement import Placement
from launcher.plan import Plan


class Backend(ABC):
    """What the loop needs of a way to train; collective calls are made by all ranks alike."""

    rank: int
    world_size: int
    device: torch.device

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.device = device
        self._placement = Placement(device)
        self._precision = plan.precision

    def to_device(self, batch: Any) -> Any:
        """Return `batch` with its tensors on this rank's device, copied beside computation."""
        return self._placement.copy(batch)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that forward and loss run in, by the plan's precision."""
        if self._precision == "bf16":
            return torch.autocast(self.device.type, dtype=torch.bfloat16)
        return contextlib.nullcontext()

    @abstractmethod
    def prepare(
        self, model: nn.Module, make_optimizer: Callable[[nn.Module], Optimizer]
    ) -> tuple[nn.Module, Optimizer]:
        """Place `model`; return the module to call, and the optimizer of its weights."""

    @abstractmethod
    def micro_step(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return the context of one micro-batch; gradients are averaged in the `last` of a step."""

    @abstractmethod
    def sum(self, values: Tensor) -> Tensor:
        """Return `values` summed over ranks (collective)."""

    @abstractmethod
    def broadcast(self, value: Any) -> Any:
        """Return rank 0's `value`, any object that can be pickled (collective)."""

    @abstractmethod
    def gather(self, value: Any) -> list[Any]:
        """Return each rank's `value`, in the order of ranks, on every rank (collective)."""

    @abstractmethod
    def close(self) -> None:
        """Leave the process group."""

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the recipe's own module inside what `prepare` returned."""
        return model

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of `loss`; over the ranks it is averaged."""
        loss.backward()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        """Clip, step and clear the gradients; return their norm before clipping."""
        parameters = [
            parameter
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if max_grad_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, max_grad_norm, norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return norm

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank (collective)."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())
