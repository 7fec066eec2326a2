"""BatchNorm over the micro-batches of all ranks.

`SyncBatchNorm` replaces torch's module of that name, which runs only on GPUs and includes
micro-batches of weight 0 in its statistics. On GPUs it uses torch's kernels. torch's module makes
the host wait for the GPU in every layer, because it removes the ranks without samples by a mask on
the device. Here the sampler knows which ranks these are, so the host does not wait.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules.batchnorm import _BatchNorm


class SyncBatchNorm(_BatchNorm):
    """BatchNorm whose statistics cover the micro-batches of all ranks.

    Input and output have shape (N, C, ...). N may differ between ranks.
    """

    has_weight = True
    """Whether the next micro-batch has a weight. One without weight takes part in the collectives
    but contributes no samples."""

    ranks_with_weight: int | None = None
    """The number of ranks, the first of all, whose next micro-batch has a weight; None for all."""

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  # torch's name
        if not self.training:
            return super().forward(input)
        at_least_single = torch.promote_types(input.dtype, torch.float32)
        counted = input if self.has_weight else input[:0].to(at_least_single)
        normalise = self._normalise_on_gpus if input.is_cuda else self._normalise_on_cpus
        normalised = normalise(counted, self._averaging_factor())
        if self.has_weight:
            return normalised
        scale = None if self.weight is None else self.weight.detach()
        shift = None if self.bias is None else self.bias.detach()
        local = functional.batch_norm(input, None, None, scale, shift, training=True, eps=self.eps)
        # The sum of an empty tensor is 0. Adding it makes this rank take part in the collectives of
        # the backward pass.
        return local + normalised.sum()

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  # torch's name
        if input.dim() < 2:
            raise ValueError(f"expected at least 2D input (got {input.dim()}D input)")

    def _averaging_factor(self) -> float | Tensor:
        """Count this batch, and return the weight of its statistics in the running statistics."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        if self.momentum is not None:
            return self.momentum
        # torch's own BatchNorm reads this number, for which the host waits.
        return self.num_batches_tracked.double().reciprocal()

    def _normalise_on_gpus(self, x: Tensor, factor: float | Tensor) -> Tensor:
        running = [b for b in (self.running_mean, self.running_var) if b is not None]
        if isinstance(factor, Tensor):
            # The kernel takes a number, so it writes the statistics of this batch.
            batch = [torch.zeros_like(buffer) for buffer in running]
            normalised = self._apply_kernels(x, *batch, momentum=1.0)
            for buffer, value in zip(running, batch, strict=True):
                buffer.lerp_(value, factor.to(value.dtype))
            return normalised
        return self._apply_kernels(x, self.running_mean, self.running_var, momentum=factor)

    def _apply_kernels(
        self, x: Tensor, mean: Tensor | None, variance: Tensor | None, *, momentum: float
    ) -> Tensor:
        """Return `x` normalised, and update the running mean and variance."""
        normalised: Tensor = _NormaliseOverRanks.apply(
            x,
            self.weight,
            self.bias,
            mean,
            variance,
            self.eps,
            momentum,
            self.ranks_with_weight,
        )
        return normalised

    def _normalise_on_cpus(self, input: Tensor, factor: float | Tensor) -> Tensor:  # noqa: A002
        """Normalise in two passes, each with one all-reduce in forward and one in backward."""
        x = input if input.dtype == torch.float64 else input.float()
        reduced_dims = [0, *range(2, x.dim())]
        shape = [1, -1] + [1] * (x.dim() - 2)
        count = x.new_full((1,), float(x.numel() // x.size(1)))
        sums = _sum_over_ranks(torch.cat([x.sum(reduced_dims), count]))
        mean, total_count = sums[:-1] / sums[-1], sums[-1].detach()
        centred = x - mean.view(shape)
        variance = _sum_over_ranks(centred.square().sum(reduced_dims)) / total_count
        if self.running_mean is not None and self.running_var is not None:
            unbiased = variance.detach() * total_count / (total_count - 1).clamp(min=1.0)
            dtype = self.running_mean.dtype
            if isinstance(factor, Tensor):
                factor = factor.to(dtype)
            self.running_mean.lerp_(mean.detach().to(dtype), factor)
            self.running_var.lerp_(unbiased.to(dtype), factor)
        normalised = centred * torch.rsqrt(variance + self.eps).view(shape)
        if self.weight is not None:
            normalised = normalised * self.weight.view(shape) + self.bias.view(shape)
        return normalised.to(input.dtype)


class _NormaliseOverRanks(torch.autograd.Function):
    """Normalisation on GPUs over the micro-batches of all ranks, with torch's kernels.

    It is torch.nn.modules._functions.SyncBatchNorm (torch 2.13), except that the host knows which
    ranks have samples.
    """

    @staticmethod
    def forward(
        context: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        eps: float,
        momentum: float,
        num_ranks: int | None,
    ) -> Tensor:
        x = _contiguous(x)
        weight = None if weight is None else weight.contiguous()
        num_channels = x.size(1)
        if x.numel():
            mean, invstd = torch.batch_norm_stats(x, eps)
        else:
            dtype = torch.promote_types(x.dtype, torch.float32)
            mean = torch.zeros(num_channels, dtype=dtype, device=x.device)
            invstd = torch.ones_like(mean)
        own = torch.cat([mean, invstd, mean.new_full((1,), float(x.numel() // num_channels))])
        rows = _gather(own)
        if num_ranks is not None:
            rows = rows.narrow(0, 0, num_ranks)
        means, invstds, counts = rows.split((num_channels, num_channels, 1), dim=1)
        counts = counts.squeeze(1)
        if running_mean is None:  # the kernel would take counts in the precision of x
            running_mean, running_var = torch.zeros_like(mean), torch.zeros_like(mean)
        mean, invstd = torch.batch_norm_gather_stats_with_counts(
            x,
            means,
            invstds,
            running_mean,
            running_var,
            momentum,
            eps,
            counts.to(running_mean.dtype),
        )
        context.save_for_backward(x, weight, mean, invstd, counts.to(torch.int32))
        if not x.numel():
            return torch.empty_like(x)
        return torch.batch_norm_elemt(x, weight, bias, mean, invstd, eps)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, weight, mean, invstd, counts = context.saved_tensors
        needs_x, needs_weight, needs_bias = context.needs_input_grad[:3]
        x_gradient = weight_gradient = bias_gradient = None
        if not x.numel():
            sums = mean.new_zeros(2 * len(mean))
            if needs_x:  # as on the other ranks
                dist.all_reduce(sums)
            return (None,) * 8
        gradient = _contiguous(gradient)
        sum_dy, sum_dy_xmu, weight_gradient, bias_gradient = torch.batch_norm_backward_reduce(
            gradient, x, mean, invstd, weight, needs_x, needs_weight, needs_bias
        )
        if needs_x:
            sums = torch.cat([sum_dy, sum_dy_xmu])
            dist.all_reduce(sums)
            sum_dy, sum_dy_xmu = sums.chunk(2)
            scale = None if weight is None else weight.to(mean.dtype)
            x_gradient = torch.batch_norm_backward_elemt(
                gradient, x, mean, invstd, scale, sum_dy, sum_dy_xmu, counts
            )
        if weight is None:
            weight_gradient = bias_gradient = None
        return (
            x_gradient,
            weight_gradient if needs_weight else None,
            bias_gradient if needs_bias else None,
            *(None,) * 5,
        )


def _contiguous(x: Tensor) -> Tensor:
    """Return a tensor in one of the memory formats that torch's BatchNorm kernels take."""
    formats = (torch.channels_last, torch.channels_last_3d)
    if any(x.is_contiguous(memory_format=memory_format) for memory_format in formats):
        return x
    return x.contiguous()


def _gather(row: Tensor) -> Tensor:
    """Return the rows of all ranks, shape (ranks, n), for a row of shape (n,) on each rank."""
    rows = row.new_empty(dist.get_world_size(), len(row))
    if row.is_cuda:
        dist.all_gather_into_tensor(rows.view(-1), row)
    else:  # gloo
        dist.all_gather(list(rows), row)
    return rows


class _SumOverRanks(torch.autograd.Function):
    """A sum over ranks whose gradient is the sum of the gradients over ranks."""

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


def _sum_over_ranks(values: Tensor) -> Tensor:
    total: Tensor = _SumOverRanks.apply(values)
    return total


def synchronize(model: nn.Module) -> nn.Module:
    """Return `model` with each BatchNorm replaced by a `SyncBatchNorm` with the same weights."""
    if isinstance(model, _BatchNorm):
        synchronized = SyncBatchNorm(
            model.num_features,
            eps=model.eps,
            momentum=model.momentum,
            affine=model.affine,
            track_running_stats=model.track_running_stats,
        )
        synchronized.train(model.training)
        synchronized.weight, synchronized.bias = model.weight, model.bias
        for name, buffer in model.named_buffers():
            setattr(synchronized, name, buffer)
        return synchronized
    for name, child in model.named_children():
        setattr(model, name, synchronize(child))
    return model
