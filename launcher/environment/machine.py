"""The resources of this machine: GPUs, usable cores, memory. Read from files, without torch.

A process may use the smallest of several limits on cores; containers and batch systems often set
one far below the number of cores in the hardware.
"""

from __future__ import annotations

import importlib.util
import os
import platform
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.environment.accelerators import find_accelerators
from launcher.recipe.text_values import digits

_WITHOUT_PEER_ACCESS = "RTX 40"
_DRIVER_WITH_PEER_ACCESS = (550, 40, 7)
"""Several GPUs whose names contain the text work together with this driver or a newer one."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The resources that a node offers the ranks on it."""

    hostname: str
    num_gpus: int
    """GPUs that this process may use."""

    usable_cores: int
    """Cores that this process may use: the smallest of all limits, at least 1."""

    cores_limited_by: str
    """Name of the limit that `usable_cores` comes from, such as `cgroup CPU quota`."""

    memory_bytes: int
    """Host memory in bytes, or the cgroup's limit if that is lower; 0 if unknown."""

    shm_bytes: int
    """Size in bytes of /dev/shm, through which DataLoader workers pass batches; 0 if unknown."""

    has_deepspeed: bool = True
    """Whether DeepSpeed is installed."""

    has_torchao: bool = True
    """Whether torchao is installed, which computes in fp8."""

    unusable: tuple[str, ...] = ()
    """A phrase for each kind of accelerator that is present and that no run can use."""

    has_compiler: bool = True
    """Whether a C++ compiler is installed, which torch.compile needs on CPUs."""


def read_machine(root: Path = Path("/"), env: Mapping[str, str] | None = None) -> Machine:
    """Return the resources of this machine.

    Args:
        root: The root of the file system to read from.
        env: The environment; None reads this process's.
    """
    env = os.environ if env is None else env
    cores, limited_by = _usable_cores(root, env)
    accelerators = find_accelerators(root, env)
    return Machine(
        hostname=platform.node(),
        num_gpus=accelerators.num_gpus,
        unusable=accelerators.unusable,
        usable_cores=cores,
        cores_limited_by=limited_by,
        memory_bytes=_memory_bytes(root),
        shm_bytes=shm_bytes(root),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
        has_torchao=importlib.util.find_spec("torchao") is not None,
        has_compiler=any(map(shutil.which, (env.get("CXX") or "g++", "g++", "clang++"))),
    )


def oom_kills(root: Path = Path("/")) -> int | None:
    """Return how many processes of this cgroup the kernel has killed for lack of memory.

    Returns:
        The count; None if the kernel keeps none. It does with cgroup version 2, and with version 1
        since Linux 4.13.
    """
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            for line in (_read(folder / name) or "").splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill" and count.isdigit():
                    return int(count)
    return None


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the bytes of memory that this process may still use; None if unknown.

    This is the smaller of the host memory that is free or reclaimable and what is left of the
    cgroup's limit.
    """
    available = []
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            available.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders(root, "memory"):
        for limit_file, usage_file in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, usage = _read(folder / limit_file) or "", _read(folder / usage_file) or ""
            if limit.isdigit() and usage.isdigit():
                available.append(int(limit) - int(usage) + _reclaimable_bytes(folder))
    return max(min(available), 0) if available else None


def _reclaimable_bytes(cgroup: Path) -> int:
    """Return the bytes of a cgroup's page cache that the kernel would reclaim."""
    for line in (_read(cgroup / "memory.stat") or "").splitlines():
        key, _, count = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(count)
    return 0


def shm_bytes(root: Path = Path("/")) -> int:
    """Return the size of /dev/shm in bytes; 0 if it does not exist."""
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return 0
    return status.f_frsize * status.f_blocks


def free_shm_bytes(root: Path = Path("/")) -> int | None:
    """Return the free bytes of /dev/shm; None if it does not exist."""
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return status.f_frsize * status.f_bavail


def gpu_driver(root: Path = Path("/")) -> str | None:
    """Return the version of the driver of the GPUs that the kernel has loaded; None without one.

    Under WSL 2 the driver is that of Windows, whose version Linux does not show. AMD's driver has a
    version if it is not the one of the kernel itself.
    """
    text = _read(root / "proc/driver/nvidia/version") or ""
    if match := re.search(r"Kernel Module.*?(\d+(\.\d+)+)", text):
        return match[1]
    if (root / "dev/kfd").exists():
        return f"amdgpu {_read(root / 'sys/module/amdgpu/version') or ''}".rstrip()
    return "of Windows" if (root / "dev/dxg").exists() else None


def lacks_peer_access(root: Path = Path("/")) -> bool:
    """Return whether NCCL must use neither peer-to-peer access nor InfiniBand on this machine.

    That holds for several GPUs of the RTX 40 series with an old driver. The rule is that of
    Accelerate, which asks `nvidia-smi` in every rank; here the files of the driver answer.
    """
    models = [
        match[1]
        for path in (root / "proc/driver/nvidia/gpus").glob("*/information")
        if (match := re.search(r"^Model:\s*(.*)", _read(path) or "", re.MULTILINE))
    ]
    if len(models) < 2 or not any(_WITHOUT_PEER_ACCESS in model for model in models):
        return False
    version = tuple(map(int, re.findall(r"\d+", gpu_driver(root) or "")))
    return bool(version) and version < _DRIVER_WITH_PEER_ACCESS


def _usable_cores(root: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Return the smallest limit on cores, and its name."""
    limits = [(os.cpu_count() or 1, "cores of this machine")]
    if hasattr(os, "sched_getaffinity"):
        limits.append((len(os.sched_getaffinity(0)), "CPU affinity"))
    if quota := _cgroup_cores(root):
        limits.append((quota, "cgroup CPU quota"))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if (count := digits(env.get(name, ""))) is not None:
            limits.append((count, name))
    cores, name = min(limits, key=lambda limit: limit[0])
    return max(cores, 1), name


def _cgroup_cores(root: Path) -> int | None:
    """Return the CPU quota in cores, rounded up; None without a quota."""
    quotas = []
    for folder in _cgroup_folders(root, "cpu"):
        quota = period = ""
        if (text := _read(folder / "cpu.max")) is not None:
            quota, _, period = text.partition(" ")
        elif (text := _read(folder / "cpu.cfs_quota_us")) is not None:
            quota, period = text, _read(folder / "cpu.cfs_period_us") or ""
        if quota.isdigit() and period.isdigit() and int(period) > 0:
            quotas.append(-(-int(quota) // int(period)))
    return max(min(quotas), 1) if quotas else None


def _memory_bytes(root: Path) -> int:
    limits = []
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemTotal:"):
            limits.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.max", "memory.limit_in_bytes"):
            if (text := _read(folder / name)) is not None and text.isdigit():
                limits.append(int(text))
    return min(limits, default=0)


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return this process's cgroup folders and their parents.

    Args:
        root: The root of the file system.
        controller: The controller of cgroup version 1; version 2 has one folder for all.
    """
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
        else:
            continue
        folder = mount / path.lstrip("/")
        while folder != mount:
            folders.append(folder)
            folder = folder.parent
        folders.append(mount)
    return folders


def _read(path: Path) -> str | None:
    """Return the text of a file without surrounding blanks; None if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
