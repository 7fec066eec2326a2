"""Test a rank's device, packages and communication in a few seconds."""

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
from launcher.environment.numa import cpu_ranges
from launcher.findings import Finding, RankDiagnostics
from launcher.printable import error_line
from launcher.runs.provenance import versions

_MATRIX_SIZE = {"cpu": 1024, "cuda": 4096}
"""Rows and columns of the matrices that are multiplied."""

_NUM_PRODUCTS = 8
_NUM_SMALL_REDUCES = 50
_LARGE_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}
_NUM_LARGE_REDUCES = 5


def free_memory(device: torch.device) -> tuple[int, int] | None:
    """Return the (free, total) bytes of a GPU; None on a CPU.

    Call it before this process allocates memory on the GPU, which would count as used.
    """
    return torch.cuda.mem_get_info(device) if device.type == "cuda" else None


def diagnose_rank(
    backend: Backend,
    *,
    rendezvous_seconds: float,
    device_memory: tuple[int, int] | None,
    node_findings: tuple[Finding, ...],
    report: Callable[[], object],
) -> RankDiagnostics:
    """Return the diagnostics of this rank (collective).

    Args:
        backend: This rank among the others.
        rendezvous_seconds: Time it took to form the process group.
        device_memory: What `free_memory` returned when the rank had started.
        node_findings: What this rank has already found out about its node.
        report: Called after each measurement.
    """
    device = backend.device
    error, flops = _measure_products(device)
    report()
    reduce_seconds = bandwidth = None
    sums_are_right = True
    if backend.world_size > 1:
        reduce_seconds, small_are_right = _measure_all_reduce(backend, 2, _NUM_SMALL_REDUCES)
        report()
        elements = _LARGE_BYTES[device.type] // 4
        seconds, large_are_right = _measure_all_reduce(backend, elements, _NUM_LARGE_REDUCES)
        # In a ring each of p ranks sends 2 (p - 1) / p of the tensor.
        share = 2 * (backend.world_size - 1) / backend.world_size
        bandwidth = share * elements * 4 / seconds
        sums_are_right = small_are_right and large_are_right
        report()
    is_cuda = device.type == "cuda"
    binding = backend.cpu_binding
    torchvision = _find_import_error("torchvision")
    report()
    return RankDiagnostics(
        rank=backend.rank,
        node=platform.node(),
        versions=_get_versions(is_cuda=is_cuda),
        device=torch.cuda.get_device_name(device) if is_cuda else f"CPU ({platform.machine()})",
        device_memory=device_memory,
        torchvision=torchvision,
        product_error=error,
        flops=flops,
        rendezvous_seconds=rendezvous_seconds,
        reduce_seconds=reduce_seconds,
        reduce_bandwidth=bandwidth,
        sums_correct=sums_are_right,
        node_findings=node_findings,
        numa_node=None if binding is None else binding.numa_node,
        cpus="" if binding is None else cpu_ranges(binding.cpus),
        unbound="" if binding is None else binding.reason,
    )


def _get_versions(*, is_cuda: bool) -> dict[str, str]:
    all_versions = versions()
    if is_cuda:
        hip = torch.version.hip  # set where torch is built for AMD's GPUs
        all_versions |= {
            **({"CUDA": str(torch.version.cuda)} if hip is None else {"ROCm": hip}),
            "NCCL": ".".join(map(str, torch.cuda.nccl.version())),
            "driver": gpu_driver() or "?",
        }
    return all_versions


def _measure_products(device: torch.device) -> tuple[float | None, float]:
    """Multiply matrices; return the largest error and the FLOP/s.

    The error is relative to the largest entry of the product in float64, and None if an entry is
    not finite.
    """
    size = _MATRIX_SIZE[device.type]
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(size, size, generator=generator).to(device) for _ in range(2))
    exact = left.double() @ right.double()
    scale = exact.abs().max()
    worst, seconds = torch.zeros((), dtype=torch.float64, device=device), []
    for _ in range(_NUM_PRODUCTS):
        product, elapsed = _time_call(device, lambda: left @ right)
        seconds.append(elapsed)
        # torch.maximum propagates NaN.
        worst = torch.maximum(worst, (product.double() - exact).abs().max() / scale)
    error = float(worst)
    return (error if math.isfinite(error) else None), 2 * size**3 / statistics.median(seconds)


def _measure_all_reduce(backend: Backend, num_elements: int, repeats: int) -> tuple[float, bool]:
    """Sum float32 numbers over ranks; return the median seconds and whether all sums are right."""
    tensor = torch.empty(num_elements, device=backend.device)
    expected = backend.world_size * (backend.world_size + 1) / 2
    seconds, all_right = [], True
    for _ in range(repeats + 1):
        tensor.fill_(backend.rank + 1)
        _, elapsed = _time_call(backend.device, lambda: backend.sum(tensor))
        seconds.append(elapsed)
        all_right = all_right and bool((tensor == expected).all())
    return statistics.median(seconds[1:]), all_right  # the first call opens connections


def _time_call(device: torch.device, function: Callable[[], Tensor]) -> tuple[Tensor, float]:
    """Return what `function` returns, and the seconds until the device has finished it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    started = time.perf_counter()
    result = function()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return result, time.perf_counter() - started


def _find_import_error(package: str) -> str:
    """Return why an installed package cannot be imported; empty if it can or is not installed."""
    if importlib.util.find_spec(package) is None:
        return ""
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001  # whatever it raises is the finding
        return error_line(error).splitlines()[0]
    return ""
