"""BatchNorm when a batch is split over ranks; `SyncBatchNorm` is in sync_batch_norm.py."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils.hooks import RemovableHandle

from launcher.engine.backends.base import Backend
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.model.sync_batch_norm import SyncBatchNorm
from launcher.engine.state.virtual_buffers import VirtualBuffers
from launcher.errors import RecipeError
from launcher.planning.global_batch import Statistics
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import (
    batch_norm_refusal,
    full_batches_of_one,
    short_batches_of_one,
)
from launcher.recipe.recipe import Recipe


class BatchNorms:
    """The BatchNorm modules of a model, and operations on the running statistics of all norms.

    Args:
        model: The model.
        virtual: The statistics of the virtual ranks of this rank, if there are any.
    """

    def __init__(self, model: nn.Module, virtual: VirtualBuffers | None = None) -> None:
        self._virtual = virtual
        self._modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        # InstanceNorm may have running statistics as well, from the samples that a rank sees.
        self._tracking = [
            module
            for module in model.modules()
            if isinstance(module, _NormBase) and module.running_mean is not None
        ]
        self._before: Tensor | None = None
        """The running statistics at the beginning of a step, one after the other."""

    def begin_step(self) -> None:
        """Begin a step, whose forward passes change the running statistics."""
        if self._tracking:
            self._before = torch.cat(self.running_statistics())

    def end_step(self) -> None:
        """Put back the running statistics that the step has made infinite or NaN.

        Its samples spoil those of one rank, or virtual rank, for good. Values are put back at once
        and without a wait for the device, so that they do not depend on when a loss is read.
        """
        if self._before is None:
            return
        buffers = self.running_statistics()
        with torch.no_grad():
            now = torch.cat(buffers)
            kept = torch.where(now.isfinite(), now, self._before)
            parts = kept.split([len(buffer) for buffer in buffers])
            torch._foreach_copy_(buffers, parts)  # one kernel for all of them
        self._before = None

    def running_statistics(self) -> list[Tensor]:
        """Return the running means and variances on this rank, of all its virtual ranks."""
        if self._virtual is not None:
            return self._virtual.floating_copies()
        return [
            buffer
            for module in self._tracking
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    @property
    def statistics(self) -> Statistics:
        """Whether batch statistics in training cover the samples of one rank or of all ranks."""
        if not self._modules:
            return "none"
        all_synced = all(isinstance(module, SyncBatchNorm) for module in self._modules)
        return "all" if all_synced else "rank"

    @property
    def has_untracked(self) -> bool:
        """Whether a module has no running statistics."""
        return any(module.running_mean is None for module in self._modules)

    def micro_batch_context(
        self, request: MicroBatchRequest
    ) -> contextlib.AbstractContextManager[None]:
        """Return the context for forward and backward of a training micro-batch."""
        virtual_rank = None if request.part is None else request.part.virtual_rank
        if self._virtual is not None and virtual_rank is not None:
            self._virtual.select(virtual_rank)
        if request.single_sample:
            return self._with_running_statistics()
        if request.has_weight and request.ranks_with_weight is None:
            return contextlib.nullcontext()
        return self._with_samples_of(request)

    @contextlib.contextmanager
    def _with_running_statistics(self) -> Iterator[None]:
        """Normalise by the running statistics without updating them.

        A single sample has no variance, and torch refuses to train on it.
        """
        trained = [module for module in self._modules if module.training]
        for module in trained:
            module.training = False
        try:
            yield
        finally:
            for module in trained:
                module.training = True

    @contextlib.contextmanager
    def _with_samples_of(self, request: MicroBatchRequest) -> Iterator[None]:
        """Exclude micro-batches without a weight from running and synchronised statistics."""
        synced = [module for module in self._modules if isinstance(module, SyncBatchNorm)]
        local = [module for module in self._tracking if not isinstance(module, SyncBatchNorm)]
        for module in synced:
            module.has_weight = request.has_weight
            module.ranks_with_weight = request.ranks_with_weight
        try:
            with contextlib.nullcontext() if request.has_weight else frozen(local):
                yield
        finally:
            for module in synced:
                module.has_weight, module.ranks_with_weight = True, None

    @torch.no_grad()
    def average(self, backend: Backend) -> None:
        """Replace the running statistics of every rank by their mean over ranks (collective)."""
        if self._virtual is not None:
            self._virtual.average(backend.sum)
            return
        buffers = [
            buffer
            for module in self._tracking
            if not isinstance(module, SyncBatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if not buffers:
            return
        for buffer, mean in zip(buffers, _mean_over_ranks(buffers, backend), strict=True):
            buffer.copy_(mean)

    @contextlib.contextmanager
    def replaced(self, values: list[Tensor], backend: Backend) -> Iterator[None]:
        """Let the modules use the mean over ranks of other statistics here (collective).

        Args:
            values: A tensor for each of `running_statistics`.
            backend: This rank among the others.
        """
        if self._virtual is not None:
            with self._virtual.replaced(values, backend.sum):
                yield
            return
        buffers = self.running_statistics()
        if not buffers:
            yield
            return
        own = [buffer.clone() for buffer in buffers]
        for buffer, mean in zip(buffers, _mean_over_ranks(values, backend), strict=True):
            buffer.copy_(mean)
        yield
        for buffer, value in zip(buffers, own, strict=True):
            buffer.copy_(value)


def _mean_over_ranks(tensors: list[Tensor], backend: Backend) -> Sequence[Tensor]:
    """Return the mean over ranks of each of some one-dimensional tensors (collective)."""
    flat = torch.cat([tensor.double() for tensor in tensors])
    return (backend.sum(flat) / backend.world_size).split([len(tensor) for tensor in tensors])


def check_first_batch_norm_input(
    recipe: Recipe, plan: Plan, num_train_samples: int, norms: BatchNorms, num_first_samples: int
) -> Recipe:
    """Return `recipe` with a check for BatchNorm over single values in its first forward call.

    BatchNorm cannot train on a single value per channel in a full batch, nor in any batch if it has
    no running statistics. Only a call of the model shows how many values a sample has, so the first
    call checks it.

    Args:
        recipe: The recipe.
        plan: The plan of the run.
        num_train_samples: The number of training samples.
        norms: The BatchNorm modules of the model.
        num_first_samples: The number of samples in this rank's first micro-batch.

    Returns:
        The recipe, whose first forward raises RecipeError if the check fails.
    """
    sizes = full_batches_of_one(plan, norms.statistics)
    if norms.has_untracked:
        sizes += short_batches_of_one(plan, num_train_samples, norms.statistics)
    if not sizes:
        return recipe
    is_first = True

    def forward(model: nn.Module, batch: Any) -> Any:
        nonlocal is_first
        if not is_first:
            return recipe.forward(model, batch)
        is_first = False
        message = functools.partial(batch_norm_refusal, plan, sizes)
        with _refusing_single_values(model, num_first_samples, message):
            return recipe.forward(model, batch)

    return replace(recipe, forward=forward)


@contextlib.contextmanager
def _refusing_single_values(
    model: nn.Module, num_samples: int, message: Callable[[str], str]
) -> Iterator[None]:
    """Raise an error if a BatchNorm module gets one value per channel and sample.

    Args:
        model: The model.
        num_samples: The number of samples in the batch.
        message: Returns the error message for the name of a module.

    Raises:
        RecipeError: A module in training mode gets one value per channel and sample.
    """

    def watch(name: str, module: _BatchNorm) -> RemovableHandle:
        def check(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and module.training and inputs[0].numel() <= num_samples * inputs[0].size(1):
                raise RecipeError(message(name))

        return module.register_forward_pre_hook(check)

    handles = [
        watch(name, module)
        for name, module in model.named_modules()
        if isinstance(module, _BatchNorm)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Do not update the running statistics of the BatchNorm modules among `modules`."""
    saved = [
        (module, module.momentum, module.num_batches_tracked.clone())
        for module in modules
        if isinstance(module, _NormBase) and module.num_batches_tracked is not None
    ]
    for module, _, _ in saved:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum, num_batches in saved:
            module.momentum = momentum
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.copy_(num_batches)
