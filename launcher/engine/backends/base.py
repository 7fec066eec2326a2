"""The seam between the training loop and the way in which ranks work together."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.engine.backends.call_order import CallOrder
from launcher.engine.backends.placement import Placement
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.hyperparameters import take_step
from launcher.engine.state.loss_scaler import LossScaler
from launcher.engine.state.module_state import (
    check_extra_state,
    own_buffers,
    own_extra_state,
    read_buffers,
    read_extra_state,
)
from launcher.engine.state.training_state import (
    Snapshot,
    StateSource,
    check_optimizer,
    keep,
    live_tensors,
    parameters,
    plain_values,
    read_into,
)
from launcher.planning.configs import AUTOCAST
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe

T = TypeVar("T")


class Backend(ABC):
    """What the loop needs of a way to train; collective calls are made by all ranks alike."""

    rank: int
    world_size: int
    device: torch.device

    def __init__(self, recipe: Recipe, plan: Plan, device: torch.device) -> None:
        self.recipe = recipe
        self.plan = plan
        self.device = device
        self.scaler = LossScaler(plan.world_size) if plan.precision == "fp16" else None
        """The scaling of the loss in fp16; None in other precisions."""
        self.call_order: CallOrder | None = None
        """Watches what ranks call where they gather weights together; None where they do not."""
        self._trained: list[nn.Parameter] | None = None
        self._dtype = (
            getattr(torch, AUTOCAST[plan.precision]) if plan.precision in AUTOCAST else None
        )
        self._placement = Placement(
            device, channels_last=recipe.channels_last, double=plan.precision == "fp64"
        )

    def to_device(self, batch: Any) -> Any:
        """Return `batch` with its tensors on this rank's device, copied beside computation."""
        return self._placement.copy(batch)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """Return the context that forward and loss run in, by the plan's precision."""
        if self._dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self._dtype)

    def communication(self) -> tuple[float, int] | None:
        """Return what this rank has waited for others, with nothing to compute beside it.

        That is (seconds, optimizer steps that were timed), in all; None where it cannot be told.
        """
        return None

    @abstractmethod
    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
    ) -> tuple[nn.Module, Optimizer]:
        """Place `model`; return the module to call, and the optimizer of its weights.

        Args:
            model: The recipe's, on the CPU.
            blocks: Its modules that may be sharded each on their own.
            make_optimizer: Makes the optimizer of a model.
        """

    def place(self, model: nn.Module) -> nn.Module:
        """Return `model` on this rank's device, in the memory format that the recipe asks for."""
        if self.recipe.channels_last:
            # In two steps: the format alone would be applied to what lies on the CPU.
            return model.to(self.device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return model.to(self.device)

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

    def in_turn(self, what: str, action: Callable[[], T]) -> T:
        """Return what `action` returns, called on the first rank of each node before its others.

        It waits without a timeout: what the first rank prepares may take long (collective).

        Args:
            what: What `action` does, for those who wait: "read the data".
            action: What to do.

        Raises:
            LostRankError: It has failed on the first rank.
        """
        return action()

    def wait_for_all(self, what: str) -> None:
        """Wait until all ranks have done `what`, without a timeout (collective)."""
        del what  # one rank alone waits for nobody

    @abstractmethod
    def close(self) -> None:
        """Leave the process group."""

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the state dict of the recipe's own module, whole, on rank 0 (collective).

        Weights that several names share come under the first of them; other ranks may get nothing.
        """
        module = self.unwrap(model)
        tensors = module.state_dict()
        return {plain_name(name): tensors[name] for name in whole_names(module)}

    def check_state(self, model: nn.Module, optimizer: Optimizer) -> None:
        """Refuse, once a step was taken, what `snapshot` would leave out.

        Raises:
            TrainingError: The optimizer or a module keeps state that a checkpoint cannot hold.
        """
        module = self.unwrap(model)
        check_optimizer(self.saved_tensors(module), optimizer)
        check_extra_state(module)

    def saved_tensors(self, module: nn.Module) -> Iterable[Tensor]:
        """Return the tensors whose optimizer state a snapshot holds."""
        return parameters(module).values()

    def snapshot(self, model: nn.Module, optimizer: Optimizer) -> Snapshot:
        """Return this rank's part of what there is to save, copied to the host (collective).

        What `check_state` refuses would be left out.
        """
        module = self.unwrap(model)
        tensors = keep(live_tensors(module, optimizer), self.rank, self.world_size)
        return Snapshot(
            tensors=tensors | own_buffers(module, self.rank, self.gather),
            values=plain_values(module, optimizer),
            extra=own_extra_state(module, self.gather),
        )

    def restore(self, model: nn.Module, optimizer: Optimizer, source: StateSource) -> None:
        """Fill model and optimizer with what was saved, on any number of ranks.

        Raises:
            CheckpointError: It is of another model.
        """
        module = self.unwrap(model)
        read_into(module, optimizer, source)
        self.restore_module(module, source)

    def restore_module(self, module: nn.Module, source: StateSource) -> None:
        """Fill buffers and extra state with what was saved.

        Raises:
            CheckpointError: It is of another model.
        """
        read_buffers(module, source, self.rank, self.world_size, self.device)
        read_extra_state(module, source, self.rank, self.world_size)

    def unwrap(self, model: nn.Module) -> nn.Module:
        """Return the recipe's own module, its parameters being those that the optimizer knows.

        Args:
            model: What `prepare` returned.
        """
        return model

    def backward(self, loss: Tensor, weight: float | Tensor) -> None:
        """Add the gradient of `loss` times `weight`; over the ranks it is averaged."""
        if self.scaler is not None:
            weight = weight * self.scaler.factor
        # The weight is where the chain rule starts: a multiplication less, forward and backward.
        loss.backward(poison_nonfinite(loss, weight))
        if self.call_order is not None:
            self.call_order.end_pass()

    def apply(self, optimizer: Optimizer, max_grad_norm: float | None) -> Tensor:
        """Clip, step and clear the gradients; return the norm of the global gradient before.

        A step whose norm is not finite is left out. The norm is that of all ranks, and so on all.
        """
        parameters = self._with_gradients(optimizer)
        grads: list[Tensor] = [p.grad for p in parameters if p.grad is not None]
        norm = self.norm(grads)
        if self.scaler is not None:
            torch._foreach_mul_(grads, 1 / self.scaler.factor)
            norm = norm / self.scaler.factor
            self.scaler.update(finite=bool(norm.isfinite()))
        if max_grad_norm is not None:
            # As torch.nn.utils.clip_grads_with_norm_, without sorting by device and dtype.
            torch._foreach_mul_(grads, torch.clamp(max_grad_norm / (norm + 1e-6), max=1.0))
        on_cpu = norm.device.type == "cpu"  # where there is nothing to wait for
        take_step(optimizer, self.recipe, math.isfinite(norm.item()) if on_cpu else norm.isfinite())
        for parameter in parameters:
            parameter.grad = None
        return norm

    def _with_gradients(self, optimizer: Optimizer) -> list[nn.Parameter]:
        """Return the parameters to update: all that are trained, used in this step or not.

        One that no sample of the batch has used gets a gradient of zeros. Sharded optimizers, whose
        parameters lie in one flat row, cannot leave it out, and every strategy takes the same step.
        """
        every = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        if self._trained is None:
            self._trained = [parameter for parameter in every if parameter.requires_grad]
        for parameter in self._trained:
            if parameter.grad is None and parameter.requires_grad:
                parameter.grad = torch.zeros_like(parameter)
        return [parameter for parameter in every if parameter.grad is not None]

    def norm(self, grads: list[Tensor]) -> Tensor:
        """Return the 2-norm of the global gradient, as one number on the device."""
        if not grads:
            return torch.zeros((), device=self.device)
        return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))  # noqa: SLF001

    def any_rank(self, flag: bool) -> bool:
        """Return whether `flag` is true on any rank (collective)."""
        return bool(self.sum(torch.tensor(float(flag), device=self.device)).item())


def poison_nonfinite(loss: Tensor, weight: float | Tensor) -> Tensor:
    """Return `weight`, or NaN where the loss is not finite.

    Gradients then are not finite either, whatever the model makes of it: every rank sees it in the
    norm of the global gradient, and none has to ask.
    """
    if loss.device.type == "cpu":  # nothing to wait for
        return torch.full_like(loss, float(weight) if math.isfinite(loss.item()) else math.nan)
    return (loss.detach() * 0.0 + weight).to(loss.dtype)


def whole_names(model: nn.Module) -> list[str]:
    """Return the names of what a state dict holds: each shared weight once, saved buffers."""
    saved = model.state_dict().keys()
    names = [name for name, _ in (*model.named_parameters(), *model.named_buffers())]
    return [name for name in names if name in saved]
