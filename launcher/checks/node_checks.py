"""What there is to say of one machine, from its files and limits."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.environment.machine import free_memory_bytes, free_shm_bytes, gpu_driver
from launcher.findings import Finding, failure, ok, warning
from launcher.planning.derivations import counted
from launcher.planning.loading import WORKERS_PER_RANK
from launcher.planning.plan import Plan
from launcher.quantities import size

_GIB = 1 << 30
_MEMORY_PER_RANK = 1.5 * _GIB
_MEMORY_PER_WORKER = 0.3 * _GIB
"""What a process costs before it holds any data (torch 2.13, resident)."""

_SHM = "/dev/shm"  # noqa: S108  # a name; nothing is written there
_LEAST_SHM = 1 * _GIB
_LEAST_DISK = 5 * _GIB
_LEAST_OPEN_FILES = 4096
"""Batches of many tensors from four workers each take a descriptor for each."""

_WRITTEN_BYTES = 16 << 20


def check_node(plan: Plan, out: Path, root: Path = Path("/")) -> Iterator[Finding]:
    """Yield what there is to say of this node for a run of `plan` with its folder below `out`."""
    yield _cores(plan)
    yield _memory(plan, free_memory_bytes(root))
    yield _shm(plan, free_shm_bytes(root))
    yield _open_files()
    yield _disk(out)
    if plan.device == "cuda":
        yield _driver(gpu_driver(root))


def _cores(plan: Plan) -> Finding:
    machine, nproc = plan.machine, plan.nproc_per_node
    ranks = f"{counted(nproc, 'rank')} with {counted(plan.workers_per_rank, 'worker')} each"
    found = f"{machine.usable_cores} usable ({machine.cores_limited_by}) for {ranks}"
    wanted = nproc * (1 + WORKERS_PER_RANK)
    limited = machine.cores_limited_by != "cores of this machine"
    if machine.usable_cores >= nproc and (plan.workers_per_rank == WORKERS_PER_RANK or not limited):
        return ok("cores", found)
    remedy = f"{wanted} would do for {WORKERS_PER_RANK} workers for each rank"
    if limited:
        remedy += "; ask the batch system for them, or widen the container's limit"
    return warning("cores", found, remedy)


def _memory(plan: Plan, free: int | None) -> Finding:
    if free is None:
        return ok("host memory", "not known")
    workers = plan.nproc_per_node * plan.workers_per_rank
    needed = plan.nproc_per_node * _MEMORY_PER_RANK + workers * _MEMORY_PER_WORKER
    found = f"{size(free)} free of {size(plan.machine.memory_bytes)}"
    if free >= needed:
        return ok("host memory", found)
    return warning(
        "host memory",
        found,
        f"{counted(plan.nproc_per_node, 'rank')} and {counted(workers, 'worker')} take about "
        f"{size(needed)} before they hold any data: use fewer workers, or ask for more memory",
    )


def _shm(plan: Plan, free: int | None) -> Finding:
    if free is None:
        return failure(
            _SHM,
            "there is none",
            "DataLoader workers and NCCL need it: `mount -t tmpfs tmpfs /dev/shm`",
        )
    found = f"{size(free)} free of {size(plan.machine.shm_bytes)}"
    if free >= _LEAST_SHM:
        return ok(_SHM, found)
    return warning(
        _SHM,
        found,
        "workers hand their batches over in it, and die of SIGBUS where it is full: "
        "`docker run --shm-size=8g` or `--ipc=host`, or num_workers=0",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    found = "no limit" if soft == unlimited else f"{soft:,} at once"
    if soft == unlimited or soft >= _LEAST_OPEN_FILES:
        return ok("open files", found)
    more = "unlimited" if hard == unlimited else f"{hard}"
    return warning(
        "open files",
        found,
        f"many workers with batches of many tensors take more: `ulimit -n {more}`",
    )


def _disk(out: Path) -> Finding:
    folder = next(each for each in (out, *out.resolve().parents) if each.is_dir())
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_WRITTEN_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return failure(
            "run folder",
            f"{folder} cannot be written: {error.strerror}",
            "give an --out on a disk that has room and that you may write to",
        )
    found = f"{size(free)} free below {folder}"
    if free >= _LEAST_DISK:
        return ok("run folder", found)
    return warning(
        "run folder",
        found,
        "a checkpoint holds weights and optimizer state, 12 bytes a parameter with AdamW, and "
        "keep_checkpoints=2 of them are kept beside the one being written",
    )


def _driver(version: str | None) -> Finding:
    if version is not None:
        return ok("driver", version)
    return failure(
        "driver",
        "the kernel has no NVIDIA driver loaded",
        "load it (`nvidia-smi` tells more), or use --device cpu",
    )
