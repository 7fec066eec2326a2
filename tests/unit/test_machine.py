"""The resources of a machine, read from a tree of files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.environment.machine import read_machine

CORES = len(os.sched_getaffinity(0))


def tree(root: Path, files: dict[str, str]) -> Path:
    """Write `files` below `root`, and return `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def test_a_plain_machine(tmp_path: Path) -> None:
    """Without cgroups and GPUs, cores follow from the affinity and memory from /proc/meminfo."""
    machine = read_machine(tree(tmp_path, {"proc/meminfo": "MemTotal:  16 kB\n"}), {})
    assert (machine.num_gpus, machine.memory_bytes) == (0, 16384)
    assert machine.usable_cores <= CORES


def test_a_container_with_cgroups_version_2(tmp_path: Path) -> None:
    """Limits of the cgroup and its parents count; a CPU quota is rounded up to cores."""
    files = {
        "proc/self/cgroup": "0::/job/step\n",
        "proc/meminfo": "MemTotal: 1000000 kB\n",
        "sys/fs/cgroup/job/cpu.max": "50000 100000\n",
        "sys/fs/cgroup/job/step/cpu.max": "max 100000\n",
        "sys/fs/cgroup/job/memory.max": "4096\n",
    }
    machine = read_machine(tree(tmp_path, files), {})
    assert (machine.usable_cores, machine.cores_limited_by) == (1, "cgroup CPU quota")
    assert machine.memory_bytes == 4096


def test_a_container_with_cgroups_version_1(tmp_path: Path) -> None:
    """The files of cgroup version 1 are read below the mount of their controllers."""
    files = {
        "proc/self/cgroup": "4:cpu,cpuacct:/job\n5:memory:/job\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_quota_us": "100000\n",
        "sys/fs/cgroup/cpu,cpuacct/job/cpu.cfs_period_us": "100000\n",
        "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "8192\n",
    }
    machine = read_machine(tree(tmp_path, files), {})
    assert machine.usable_cores == 1
    assert machine.memory_bytes == 8192


def test_slurm_limits_the_cores(tmp_path: Path) -> None:
    """SLURM_CPUS_PER_TASK limits the cores, and is named as the limit."""
    machine = read_machine(tmp_path, {"SLURM_CPUS_PER_TASK": "1"})
    assert (machine.usable_cores, machine.cores_limited_by) == (1, "SLURM_CPUS_PER_TASK") or (
        CORES == 1
    )


def test_a_count_of_cores_that_is_no_number_is_ignored(tmp_path: Path) -> None:
    """Characters that Unicode calls digits and `int` does not read limit nothing."""
    limited_by = read_machine(tmp_path, {"SLURM_CPUS_PER_TASK": "²"}).cores_limited_by
    assert limited_by != "SLURM_CPUS_PER_TASK"


@pytest.mark.parametrize(
    ("visible", "usable"),
    [
        (None, 4),
        ("", 0),
        ("0,2", 2),
        ("0,7,1", 1),
        ("-1", 0),
        ("GPU-aa,GPU-bb", 2),
        ("1,-1,2", 1),
        ("²", 1),
    ],
)
def test_gpus_that_are_visible(tmp_path: Path, visible: str | None, usable: int) -> None:
    """CUDA_VISIBLE_DEVICES is read from the left up to the first invalid entry, as CUDA does."""
    files = {f"dev/nvidia{number}": "" for number in range(4)}
    files |= {"dev/nvidiactl": "", "dev/nvidia-uvm": ""}
    env = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    assert read_machine(tree(tmp_path, files), env).num_gpus == usable
