"""Findings about one node: cores, memory, /dev/shm, open files, disk, GPU driver and health."""

from __future__ import annotations

import os
import resource
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from launcher.checks.health_checks import check_health
from launcher.environment.machine import free_memory_bytes, free_shm_bytes, gpu_driver
from launcher.findings import Finding, failure, ok, warning
from launcher.paths import is_dir
from launcher.planning.derivations import counted
from launcher.planning.loading import WORKERS_PER_RANK
from launcher.planning.plan import Plan
from launcher.quantities import size

_GIB = 1 << 30
_BYTES_PER_RANK = 1.5 * _GIB
_BYTES_PER_WORKER = 0.3 * _GIB
"""Resident memory of a process before it holds any data (measured with torch 2.13)."""

_SHM = "/dev/shm"  # noqa: S108  # a name; nothing is written there
_MIN_SHM_BYTES = 1 * _GIB
_MIN_DISK_BYTES = 5 * _GIB
_MIN_OPEN_FILES = 4096
"""Each tensor of each batch in flight takes a descriptor, and each rank may have four workers."""

_TEST_BYTES = 16 << 20
"""Bytes that are written and synced to test whether the disk accepts data."""


def check_node(
    plan: Plan, out: Path, root: Path = Path("/"), *, launched_by: int | None = None
) -> Iterator[Finding]:
    """Yield the findings about this node.

    Args:
        plan: The plan of a run on this node.
        out: Folder in which run folders would be created.
        root: Root of the files of /proc, /sys and /dev that are read.
        launched_by: Id of the process that has started the ranks; None if none are running.
    """
    yield _cores(plan)
    yield _memory(plan, free_memory_bytes(root))
    yield _shm(plan, free_shm_bytes(root))
    yield _open_files()
    yield _disk(out)
    if plan.device == "cuda":
        yield _driver(gpu_driver(root))
        yield from check_health(root, launched_by=launched_by)


def _cores(plan: Plan) -> Finding:
    machine, nproc = plan.machine, plan.nproc_per_node
    ranks = f"{counted(nproc, 'rank')} with {counted(plan.workers_per_rank, 'worker')} each"
    found = f"{machine.usable_cores} usable ({machine.cores_limited_by}) for {ranks}"
    sufficient = nproc * (1 + WORKERS_PER_RANK)
    is_limited = machine.cores_limited_by != "cores of this machine"
    has_workers = plan.workers_per_rank == WORKERS_PER_RANK
    if machine.usable_cores >= nproc and (has_workers or not is_limited):
        return ok("cores", found)
    remedy = f"{sufficient} cores are enough for {WORKERS_PER_RANK} workers per rank"
    if is_limited:
        remedy += "; request them from the batch system, or raise the limit of the container"
    return warning("cores", found, remedy)


def _memory(plan: Plan, free: int | None) -> Finding:
    if free is None:
        return ok("host memory", "unknown")
    workers = plan.nproc_per_node * plan.workers_per_rank
    needed = plan.nproc_per_node * _BYTES_PER_RANK + workers * _BYTES_PER_WORKER
    found = f"{size(free)} free of {size(plan.machine.memory_bytes)}"
    if free >= needed:
        return ok("host memory", found)
    return warning(
        "host memory",
        found,
        f"use fewer workers or request more memory: {counted(plan.nproc_per_node, 'rank')} and "
        f"{counted(workers, 'worker')} take about {size(needed)} before they hold any data",
    )


def _shm(plan: Plan, free: int | None) -> Finding:
    if free is None:
        return failure(
            _SHM,
            "it does not exist",
            "mount it with `mount -t tmpfs tmpfs /dev/shm`: DataLoader workers and NCCL need it",
        )
    found = f"{size(free)} free of {size(plan.machine.shm_bytes)}"
    if free >= _MIN_SHM_BYTES:
        return ok(_SHM, found)
    return warning(
        _SHM,
        found,
        "enlarge it with `docker run --shm-size=8g` or `--ipc=host`, or set num_workers=0: workers "
        "pass their batches through it and die of SIGBUS when it is full",
    )


def _open_files() -> Finding:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    unlimited = resource.RLIM_INFINITY
    most = hard if soft != unlimited else soft  # a rank with workers raises the soft limit to it
    found = "no limit" if most == unlimited else f"{most:,} at once"
    if most == unlimited or most >= _MIN_OPEN_FILES:
        return ok("open files", found)
    return warning(
        "open files",
        found,
        "raise the hard limit (`ulimit -Hn`, as root or in /etc/security/limits.conf): workers "
        "need a descriptor for each tensor of a batch",
    )


def _disk(out: Path) -> Finding:
    folder = next(path for path in (out, *out.resolve().parents) if is_dir(path))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(_TEST_BYTES))
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        return failure(
            "run folder",
            f"{folder} cannot be written: {error.strerror}",
            "set --out to a folder that you may write to, on a disk with free space",
        )
    found = f"{size(free)} free in {folder}"
    if free >= _MIN_DISK_BYTES:
        return ok("run folder", found)
    return warning(
        "run folder",
        found,
        "free some space or set --out to a larger disk: a checkpoint holds weights and optimizer "
        "state, 12 bytes per parameter with AdamW, and keep_checkpoints=2 of them stay on disk "
        "while the next is written",
    )


def _driver(version: str | None) -> Finding:
    if version is not None:
        return ok("driver", version)
    return failure(
        "driver",
        "the kernel has no driver for the GPUs loaded",
        "load the driver (`nvidia-smi` prints more), or use --device cpu",
    )
