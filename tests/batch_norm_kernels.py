"""torch's BatchNorm kernels for GPUs, for tensors on the CPU, and two tests on ranks that use them.

A program for test_sync_batch_norm.py. It forks the ranks, and on each compares the path that GPUs
take with BatchNorm over the batch of all ranks.
"""

from __future__ import annotations

import copy
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.multiprocessing.spawn import start_processes

from launcher.engine.model.sync_batch_norm import SyncBatchNorm, synchronize


def _dims(x: Tensor) -> list[int]:
    return [0, *range(2, x.dim())]


def _by_channel(values: Tensor, x: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (x.dim() - 2))


def stats(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return mean and inverse standard deviation of each channel."""
    assert x.numel(), "the kernel divides by the number of elements"
    variance = x.var(_dims(x), unbiased=False)
    return x.mean(_dims(x)), torch.rsqrt(variance + eps)


def gather_stats(
    _: Tensor,
    means: Tensor,
    invstds: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    counts: Tensor,
) -> tuple[Tensor, Tensor]:
    """Combine the statistics of ranks by Welford's method, as batch_norm_gather_stats does."""
    mean, variance, total = torch.zeros_like(means[0]), torch.zeros_like(means[0]), 0.0
    for rank_mean, invstd, count in zip(means, invstds, counts.tolist(), strict=True):
        assert count, "the kernel divides by the counts so far"
        inverse = 1 / (total + count)
        own = ((1 / invstd).square() - eps) * count
        variance = variance + own + (mean - rank_mean).square() * total * count * inverse
        mean = total * inverse * mean + count * inverse * rank_mean
        total += count
    if running_mean is not None and running_var is not None:
        assert counts.dtype == running_mean.dtype
        running_mean.mul_(1 - momentum).add_(momentum * mean)
        running_var.mul_(1 - momentum).add_(momentum * variance / (total - 1))
    return mean, torch.rsqrt(variance / total + eps)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, invstd: Tensor, _: float
) -> Tensor:
    """Return x normalised, scaled and shifted."""
    out = (x - _by_channel(mean, x)) * _by_channel(invstd, x)
    if weight is not None and bias is not None:
        out = out * _by_channel(weight, x) + _by_channel(bias, x)
    return out


def backward_reduce(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    *_: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the sums over this rank's samples that the gradients need."""
    sum_dy = gradient.sum(_dims(x))
    sum_dy_xmu = (gradient * (x - _by_channel(mean, x))).sum(_dims(x))
    return sum_dy, sum_dy_xmu, sum_dy_xmu * invstd, sum_dy.clone()


def backward_elements(
    gradient: Tensor,
    x: Tensor,
    mean: Tensor,
    invstd: Tensor,
    weight: Tensor | None,
    sum_dy: Tensor,
    sum_dy_xmu: Tensor,
    counts: Tensor,
) -> Tensor:
    """Return the gradient of x."""
    assert counts.dtype == torch.int32
    total = counts.sum()
    scale = invstd if weight is None else invstd * weight
    centred = x - _by_channel(mean, x)
    projected = centred * _by_channel(invstd.square() * sum_dy_xmu / total, x)
    return (gradient - _by_channel(sum_dy / total, x) - projected) * _by_channel(scale, x)


KERNELS: dict[str, Callable[..., Any]] = {
    "batch_norm_stats": stats,
    "batch_norm_gather_stats_with_counts": gather_stats,
    "batch_norm_elemt": normalise,
    "batch_norm_backward_reduce": backward_reduce,
    "batch_norm_backward_elemt": backward_elements,
}


def compare(sizes: Sequence[int], rank: int, module: nn.Module) -> None:
    """Compare three steps with those of BatchNorm over the whole batch.

    Args:
        sizes: The number of samples of each rank; a rank with none has a micro-batch of weight 0.
        rank: This rank.
        module: The BatchNorm.
    """
    whole, synced = copy.deepcopy(module), synchronize(copy.deepcopy(module))
    assert isinstance(synced, SyncBatchNorm)
    synced._normalise_on_cpus = synced._normalise_on_gpus  # type: ignore[method-assign,assignment]
    with_samples = sum(size > 0 for size in sizes)
    synced.has_weight = sizes[rank] > 0
    synced.ranks_with_weight = None if with_samples == len(sizes) else with_samples
    torch.manual_seed(0)
    for _ in range(3):
        batch = torch.randn(sum(sizes), 4, 3, 2).double() * 3 + 1
        target = torch.randn(sum(sizes), 4, 3, 2).double()
        everything = batch.clone().requires_grad_()
        expected = whole(everything)
        (expected * target).sum().backward()

        own = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
        has_samples = sizes[rank] > 0
        x = (batch[own] if has_samples else batch[:2]).clone().requires_grad_()
        out = synced(x)
        if has_samples:
            torch.testing.assert_close(out, expected[own])
            (out * target[own]).sum().backward()
            assert everything.grad is not None
            torch.testing.assert_close(x.grad, everything.grad[own])
        else:
            (out * 0.0).sum().backward()
        for name, buffer in whole.named_buffers():
            torch.testing.assert_close(synced.get_buffer(name), buffer)
    for name, parameter in whole.named_parameters():
        total = synced.get_parameter(name).grad
        total = torch.zeros_like(parameter) if total is None else total
        dist.all_reduce(total)
        torch.testing.assert_close(total, parameter.grad)


def run_rank(rank: int, ranks: int, folder: Path) -> None:
    """Compare with different modules and batches, as one of the ranks."""
    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    for name, kernel in KERNELS.items():
        library.impl(name, kernel, "CPU")  # type: ignore[no-untyped-call]
    dist.init_process_group("gloo", init_method=f"file://{folder}/r", rank=rank, world_size=ranks)
    modules = [
        nn.BatchNorm2d(4, momentum=momentum, affine=affine, track_running_stats=tracks).double()
        for momentum in (0.1, None)
        for affine in (True, False)
        for tracks in (True, False)
    ]
    for sizes in ((4, 4, 4), (5, 3, 2), (3, 2, 0), (4, 0, 0)):
        for module in modules:
            compare(sizes, rank, module)
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    start_processes(run_rank, (3, Path.cwd()), 3, start_method="fork")  # type: ignore[no-untyped-call]
