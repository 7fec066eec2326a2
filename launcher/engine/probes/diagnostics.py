"""What a rank finds out about its device, its packages and its group in a few seconds."""

from __future__ import annotations

import importlib
import importlib.util
import math
import platform
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from launcher.engine.backends.base import Backend
from launcher.environment.machine import gpu_driver
from launcher.findings import Finding, RankDiagnostics
from launcher.runs.provenance import versions

_SIZE = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the matrices that are multiplied."""

_PRODUCTS = 8
_SMALL_REDUCES = 50
_LARGE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_LARGE_REDUCES = 5


def diagnose_rank(
    backend: Backend, meeting_seconds: float, node: tuple[Finding, ...] = ()
) -> RankDiagnostics:
    """Return what this rank finds (collective).

    Args:
        backend: This rank among the others.
        meeting_seconds: What it took to form their group.
        node: What this rank already knows of its node.
    """
    device = backend.device
    error, flops = _multiply(device)
    reduce_seconds = bandwidth = None
    right = True
    if backend.world_size > 1:
        reduce_seconds, right_small = _reduce(backend, 2, _SMALL_REDUCES)
        elements = _LARGE_BYTES[device.type] // 4
        seconds, right_large = _reduce(backend, elements, _LARGE_REDUCES)
        # In a ring each rank sends 2 (p - 1) / p of the tensor.
        share = 2 * (backend.world_size - 1) / backend.world_size
        bandwidth = share * elements * 4 / seconds
        right = right_small and right_large
    cuda = device.type == "cuda"
    return RankDiagnostics(
        rank=backend.rank,
        node=platform.node(),
        versions=_versions(cuda=cuda),
        device=torch.cuda.get_device_name(device) if cuda else f"CPU ({platform.machine()})",
        device_memory=torch.cuda.mem_get_info(device) if cuda else None,
        torchvision=_why_not("torchvision"),
        product_error=error,
        flops=flops,
        meeting_seconds=meeting_seconds,
        reduce_seconds=reduce_seconds,
        reduce_bandwidth=bandwidth,
        sums_right=right,
        node_findings=node,
    )


def _versions(*, cuda: bool) -> dict[str, str]:
    found = versions()
    if cuda:
        found |= {
            "CUDA": str(torch.version.cuda),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": gpu_driver() or "?",
        }
    return found


def _multiply(device: torch.device) -> tuple[float | None, float]:
    """Multiply matrices; return the largest error, None where one is not finite, and FLOP/s.

    The error is relative to the largest entry of the product in float64.
    """
    size = _SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    one, other = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    exact = one.double() @ other.double()
    scale = exact.abs().max()
    worst, seconds = torch.zeros((), dtype=torch.float64, device=device), []
    for _ in range(_PRODUCTS):
        product, taken = _timed(device, lambda: one @ other)
        seconds.append(taken)
        # maximum hands a NaN on
        worst = torch.maximum(worst, (product.double() - exact).abs().max() / scale)
    error = float(worst)
    return (error if math.isfinite(error) else None), 2 * size**3 / statistics.median(seconds)


def _reduce(backend: Backend, elements: int, times: int) -> tuple[float, bool]:
    """Sum floats over the ranks; return the median seconds, and whether the sums are right."""
    tensor = torch.empty(elements, device=backend.device)
    wanted = backend.world_size * (backend.world_size + 1) / 2
    seconds, right = [], True
    for _ in range(times + 1):
        tensor.fill_(backend.rank + 1)
        _, taken = _timed(backend.device, lambda: backend.sum(tensor))
        seconds.append(taken)
        right = right and bool((tensor == wanted).all())
    return statistics.median(seconds[1:]), right  # the first makes connections


def _timed(device: torch.device, work: Callable[[], Tensor]) -> tuple[Tensor, float]:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    done = work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return done, time.perf_counter() - started


def _why_not(package: str) -> str:
    """Return why a package cannot be imported; empty where it can or is not installed."""
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001  # whatever it raises is the finding
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
