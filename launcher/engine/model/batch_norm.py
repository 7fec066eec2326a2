"""BatchNorm when a batch is split over ranks.

torch's own `SyncBatchNorm` module runs on GPUs alone, and counts a micro-batch of weight 0 like any
other; its kernels are used.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules._functions import SyncBatchNorm as TorchSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from launcher.engine.backends.base import Backend
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.errors import RecipeError
from launcher.planning.global_batch import Statistics
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import (
    full_batches_of_one,
    refusal,
    short_batches_of_one,
)
from launcher.recipe.recipe import Recipe


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose statistics are over the micro-batches of all ranks together.

    Input and output are of shape (N, C, ...), with another N on each rank if need be.
    """

    counts = True
    """Whether the coming micro-batch has a weight; one that has none takes part without samples."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        if not self.training:
            return super().forward(input)
        at_least_single = torch.promote_types(input.dtype, torch.float32)
        own = input if self.counts else input[:0].to(at_least_single)
        together = self._on_gpus if input.is_cuda else self._on_cpus
        normalised = together(own, self._share())
        if self.counts:
            return normalised
        scale = None if self.weight is None else self.weight.detach()
        shift = None if self.bias is None else self.bias.detach()
        alone = functional.batch_norm(input, None, None, scale, shift, training=True, eps=self.eps)
        # The sum over nothing is 0: it has this rank take part in the others' backward.
        return alone + normalised.sum()

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _share(self) -> float:
        """Return how far the running statistics move, and count this batch among them."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _on_gpus(self, own: Tensor, share: float) -> Tensor:
        normalised: Tensor = TorchSyncBatchNorm.apply(
            own,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.eps,
            share,
            dist.group.WORLD,
            dist.get_world_size(),
        )
        return normalised

    def _on_cpus(self, own: Tensor, share: float) -> Tensor:
        """Normalise in two passes, each with one all-reduce forward and one backward."""
        x = own if own.dtype == torch.float64 else own.float()
        over = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_full((1,), float(x.numel() // x.size(1)))
        sums = _over_ranks(torch.cat([x.sum(over), count]))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = x - mean.view(shape)
        variance = _over_ranks(centred.square().sum(over)) / total
        if self.running_mean is not None and self.running_var is not None:
            unbiased = variance.detach() * total / (total - 1).clamp(min=1.0)
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), share)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), share)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(own.dtype)


class _SumOverRanks(torch.autograd.Function):
    """The sum over ranks, whose gradient is the sum over ranks of the gradients."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


def _over_ranks(values: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(values)
    return total


def synchronize(model: nn.Module) -> nn.Module:
    """Return `model` with each BatchNorm in it replaced by `SyncBatchNorm`, weights kept."""
    if isinstance(model, _BatchNorm):
        made = SyncBatchNorm(
            model.num_features,
            eps=model.eps,
            momentum=model.momentum,
            affine=model.affine,
            track_running_stats=model.track_running_stats,
        )
        made.train(model.training)
        made.weight, made.bias = model.weight, model.bias
        for name, buffer in model.named_buffers():
            setattr(made, name, buffer)
        return made
    for name, child in model.named_children():
        setattr(model, name, synchronize(child))
    return model


class BatchNorms:
    """All the BatchNorm modules of a model."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = [module for module in model.modules() if isinstance(module, _BatchNorm)]
        self._tracking = [module for module in self._modules if module.running_mean is not None]
        self._kept: list[Tensor] = []

    def keep(self) -> None:
        """Keep the running statistics as they are, to go back to."""
        self._kept = [buffer.clone() for buffer in self._statistics()]

    @torch.no_grad()
    def restore_nonfinite(self) -> None:
        """Put back those of the kept statistics that a batch has made infinite or NaN."""
        for buffer, kept in zip(self._statistics(), self._kept, strict=False):
            buffer.copy_(torch.where(buffer.isfinite().all(), buffer, kept))

    def _statistics(self) -> list[Tensor]:
        return [
            buffer
            for module in self._tracking
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]

    @property
    def statistics(self) -> Statistics:
        """What they take statistics over in training."""
        if not self._modules:
            return "none"
        synced = all(isinstance(module, SyncBatchNorm) for module in self._modules)
        return "all" if synced else "rank"

    @property
    def untracked(self) -> bool:
        """Whether some have no running statistics."""
        return len(self._tracking) < len(self._modules)

    def taking(self, request: MicroBatchRequest) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a micro-batch of training is taken, forward and backward."""
        if request.alone:
            return self._with_running_statistics()
        return contextlib.nullcontext() if request.counts else self.ignoring_samples()

    @contextlib.contextmanager
    def _with_running_statistics(self) -> Iterator[None]:
        """Normalise by the running statistics and leave them as they are.

        One sample has no variance: plain torch refuses to train on it, after a whole epoch.
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
    def ignoring_samples(self) -> Iterator[None]:
        """Leave running and synchronised statistics as if this micro-batch were not there."""
        synced = [module for module in self._modules if isinstance(module, SyncBatchNorm)]
        local = [module for module in self._tracking if not isinstance(module, SyncBatchNorm)]
        for module in synced:
            module.counts = False
        try:
            with frozen(local):
                yield
        finally:
            for module in synced:
                module.counts = True

    @torch.no_grad()
    def average(self, backend: Backend) -> None:
        """Give every rank the mean of the ranks' running statistics (collective)."""
        buffers = [
            buffer
            for module in self._tracking
            if not isinstance(module, SyncBatchNorm)
            for buffer in (module.running_mean, module.running_var)
            if buffer is not None
        ]
        if not buffers:
            return
        flat = torch.cat([buffer.double() for buffer in buffers])
        means = backend.sum(flat) / backend.world_size
        for buffer, mean in zip(buffers, means.split([len(b) for b in buffers]), strict=True):
            buffer.copy_(mean)


def refuse_single_samples(
    recipe: Recipe, plan: Plan, samples: int, norms: BatchNorms, taken: int
) -> Recipe:
    """Return `recipe` with a forward that refuses, the first time, what BatchNorm cannot train on.

    That is a single value per channel in a full batch, or in any where there are no running
    statistics. Whether a sample has one value or more shows when the model is called.

    Args:
        recipe: What is trained.
        plan: How.
        samples: Training samples.
        norms: Those of the model.
        taken: Samples in this rank's first micro-batch.
    """
    sizes = full_batches_of_one(plan, norms.statistics)
    if norms.untracked:
        sizes += short_batches_of_one(plan, samples, norms.statistics)
    if not sizes:
        return recipe
    is_first = True

    def forward(model: nn.Module, batch: Any) -> Any:
        nonlocal is_first
        if not is_first:
            return recipe.forward(model, batch)
        is_first = False
        with _refusing_single_values(model, taken, lambda name: refusal(plan, sizes, name)):
            return recipe.forward(model, batch)

    return replace(recipe, forward=forward)


@contextlib.contextmanager
def _refusing_single_values(
    model: nn.Module, taken: int, text: Callable[[str], str]
) -> Iterator[None]:
    """Refuse a BatchNorm that sees one value per channel and sample of `taken` samples."""

    def watch(name: str, module: _BatchNorm) -> RemovableHandle:
        def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
            if inputs and module.training and inputs[0].numel() <= taken * inputs[0].size(1):
                raise RecipeError(text(name.removeprefix("module.")))  # which DDP adds

        return module.register_forward_pre_hook(look)

    handles = [watch(n, each) for n, each in model.named_modules() if isinstance(each, _BatchNorm)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def frozen(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Keep the running statistics of the BatchNorm modules among `modules` as they are."""
    kept = [
        (module, module.momentum, module.num_batches_tracked.clone())
        for module in modules
        if isinstance(module, _BatchNorm) and module.num_batches_tracked is not None
    ]
    for module, _, _ in kept:
        module.momentum = 0.0
    try:
        yield
    finally:
        for module, momentum, tracked in kept:
            module.momentum = momentum
            assert module.num_batches_tracked is not None
            module.num_batches_tracked.copy_(tracked)
