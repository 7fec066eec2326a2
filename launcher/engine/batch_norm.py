"""BatchNorm when a batch is split over ranks.

torch's own `SyncBatchNorm` runs on GPUs alone, and counts a micro-batch of weight 0 like any other.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn
from torch.distributed.nn.functional import all_reduce
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm

from launcher.engine.backends.base import Backend


class SyncBatchNorm(nn.SyncBatchNorm):
    """BatchNorm whose statistics are over the micro-batches of all ranks together.

    Input and output are of shape (N, C, ...), with another N on each rank if need be.
    """

    counts = True
    """Whether the coming micro-batch has a weight; one that has none takes part without samples."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        if not self.training:
            return super().forward(input)
        own = input if self.counts else input[:0]
        together = super().forward if input.is_cuda else self._over_all_ranks
        normalised = together(own)
        if self.counts:
            return normalised
        scale = None if self.weight is None else self.weight.detach()
        shift = None if self.bias is None else self.bias.detach()
        alone = functional.batch_norm(input, None, None, scale, shift, training=True, eps=self.eps)
        # The sum over nothing is 0: it has this rank take part in the others' backward.
        return alone + normalised.sum()

    def _over_all_ranks(self, own: Tensor) -> Tensor:
        """Normalise `own` in two passes, each with one all-reduce forward and one backward."""
        x = own if own.dtype == torch.float64 else own.float()
        over = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_full((1,), float(x.numel() // x.size(1)))
        sums = all_reduce(torch.cat([x.sum(over), count]))
        mean, total = sums[:-1] / sums[-1], sums[-1].detach()
        centred = x - mean.view(shape)
        variance = all_reduce(centred.square().sum(over)) / total
        self._follow(mean.detach(), variance.detach() * total / (total - 1).clamp(min=1.0))
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(own.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor) -> None:
        """Move the running statistics towards those of this batch."""
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        share = self.momentum
        if share is None:
            share = 1.0 / float(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), share)
        self.running_var.lerp_(variance.to(self.running_var.dtype), share)


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
