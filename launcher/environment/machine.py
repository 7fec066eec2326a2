"""What this machine offers a run: GPUs, usable cores, memory. Read from files, without torch.

The number of cores that a process may use is the least of several limits, and a container or a
batch system often sets one far below what the hardware has.
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


@dataclass(frozen=True, kw_only=True)
class Machine:
    """One node, as a run on it will find it."""

    hostname: str
    num_gpus: int
    """GPUs that this process may use."""

    usable_cores: int
    """Cores that this process may use: the least of all limits, at least 1."""

    cores_limited_by: str
    """The limit that `usable_cores` comes from, in words."""

    memory_bytes: int
    """Host memory, or the cgroup's limit where that is lower; 0 where unknown."""

    shm_bytes: int
    """Size of /dev/shm, through which DataLoader workers hand over batches; 0 where unknown."""

    has_deepspeed: bool = True
    """Whether DeepSpeed is installed."""

    has_compiler: bool = True
    """Whether there is a C++ compiler, which torch.compile needs on CPUs."""


def read_machine(root: Path = Path("/"), env: Mapping[str, str] | None = None) -> Machine:
    """Read this machine from the file system below `root` and the environment `env`."""
    env = os.environ if env is None else env
    cores, limited_by = _usable_cores(root, env)
    return Machine(
        hostname=platform.node(),
        num_gpus=_num_gpus(root, env),
        usable_cores=cores,
        cores_limited_by=limited_by,
        memory_bytes=_memory_bytes(root),
        shm_bytes=_shm_bytes(root),
        has_deepspeed=importlib.util.find_spec("deepspeed") is not None,
        has_compiler=any(map(shutil.which, (env.get("CXX") or "g++", "g++", "clang++"))),
    )


def oom_kills(root: Path = Path("/")) -> int | None:
    """Return how many processes of this cgroup the kernel has killed for memory, where it counts.

    Of cgroup version 2, or of version 1 since Linux 4.13.
    """
    for folder in _cgroup_folders(root, "memory"):
        for name in ("memory.events", "memory.oom_control"):
            for line in (_read(folder / name) or "").splitlines():
                key, _, count = line.partition(" ")
                if key == "oom_kill" and count.isdigit():
                    return int(count)
    return None


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """Return the host memory that is free or can be freed, or what the cgroup has left of its."""
    free = []
    for line in (_read(root / "proc/meminfo") or "").splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    for folder in _cgroup_folders(root, "memory"):
        for limit, used in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            most, now = _read(folder / limit) or "", _read(folder / used) or ""
            if most.isdigit() and now.isdigit():
                free.append(int(most) - int(now) + _reclaimable(folder))
    return max(min(free), 0) if free else None


def _reclaimable(cgroup: Path) -> int:
    """Return the bytes of a cgroup that hold files and would be given up."""
    for line in (_read(cgroup / "memory.stat") or "").splitlines():
        key, _, count = line.partition(" ")
        if key in ("inactive_file", "total_inactive_file"):
            return int(count)
    return 0


def free_shm_bytes(root: Path = Path("/")) -> int | None:
    """Return what is free of /dev/shm; None where there is none."""
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return None
    return status.f_frsize * status.f_bavail


def gpu_driver(root: Path = Path("/")) -> str | None:
    """Return the version of the NVIDIA driver that the kernel has loaded."""
    text = _read(root / "proc/driver/nvidia/version") or ""
    found = re.search(r"Kernel Module.*?(\d+(\.\d+)+)", text)
    return found[1] if found else None


def _num_gpus(root: Path, env: Mapping[str, str]) -> int:
    """Count NVIDIA device files, less what CUDA_VISIBLE_DEVICES hides.

    CUDA reads that variable from the left and stops at the first entry that is no device.
    """
    present = sum(path.name[6:].isdigit() for path in (root / "dev").glob("nvidia[0-9]*"))
    visible = env.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return present
    usable = 0
    for entry in map(str.strip, visible.split(",")):
        if not entry or entry.startswith("-") or (entry.isdigit() and int(entry) >= present):
            break
        usable += 1
    return min(usable, present)


def _usable_cores(root: Path, env: Mapping[str, str]) -> tuple[int, str]:
    """Return the least limit on cores, and which it is."""
    limits = [(os.cpu_count() or 1, "cores of this machine")]
    if hasattr(os, "sched_getaffinity"):
        limits.append((len(os.sched_getaffinity(0)), "CPU affinity"))
    if quota := _cgroup_cores(root):
        limits.append((quota, "cgroup CPU quota"))
    for name in ("SLURM_CPUS_PER_TASK", "SLURM_CPUS_ON_NODE"):
        if env.get(name, "").isdigit():
            limits.append((int(env[name]), name))
    cores, name = min(limits, key=lambda limit: limit[0])
    return max(cores, 1), name


def _cgroup_cores(root: Path) -> int | None:
    """Return the CPU quota in whole cores, rounded up; None where there is none."""
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


def _shm_bytes(root: Path) -> int:
    try:
        status = os.statvfs(root / "dev/shm")
    except OSError:
        return 0
    return status.f_frsize * status.f_blocks


def _cgroup_folders(root: Path, controller: str) -> list[Path]:
    """Return this process's cgroup folder and its parents, for version 2 and `controller` of 1."""
    folders = []
    for line in (_read(root / "proc/self/cgroup") or "").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controllers
        else:
            continue
        own = mount / path.lstrip("/")
        while own != mount:
            folders.append(own)
            own = own.parent
        folders.append(mount)
    return folders


def _read(path: Path) -> str | None:
    try:
        return path.read_text().strip()
    except OSError:
        return None
