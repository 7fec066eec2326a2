"""The resources of a machine, read from a tree of files like the kernel's."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from launcher.environment.accelerators import find_accelerators
from launcher.environment.machine import lacks_peer_access, read_machine
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve
from launcher.runs.plan_recipe import plan_recipe

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


def test_mig_instances(tmp_path: Path) -> None:
    """CUDA shows a process one instance, whatever its variable lists; the others are named."""
    instance = "proc/driver/nvidia/capabilities/gpu0/mig/gi{}/ci0/access"
    files = {"dev/nvidia0": "", instance.format(1): "", instance.format(2): ""}
    env = {"CUDA_VISIBLE_DEVICES": "MIG-aa,MIG-bb"}
    machine = read_machine(tree(tmp_path, files), env)
    assert machine.num_gpus == 1
    assert "MIG" in machine.unusable[0]


def test_gpus_that_are_all_divided_are_one(tmp_path: Path) -> None:
    """Of two GPUs that are both divided by MIG, CUDA shows one instance; of one, also the other."""
    instance = "proc/driver/nvidia/capabilities/gpu{}/mig/gi1/ci0/access"
    files = {"dev/nvidia0": "", "dev/nvidia1": "", instance.format(0): ""}
    assert read_machine(tree(tmp_path / "one", files), {}).num_gpus == 2
    files[instance.format(1)] = ""
    assert read_machine(tree(tmp_path / "both", files), {}).num_gpus == 1


@pytest.mark.parametrize(
    ("env", "usable"),
    [
        ({}, 2),
        ({"HIP_VISIBLE_DEVICES": "1"}, 1),
        ({"ROCR_VISIBLE_DEVICES": "0,1", "HIP_VISIBLE_DEVICES": "0"}, 1),
        ({"CUDA_VISIBLE_DEVICES": ""}, 0),
    ],
)
def test_gpus_of_amd(tmp_path: Path, env: dict[str, str], usable: int) -> None:
    """With a torch for ROCm, the GPUs of AMD's driver count; with another one they are named."""
    nodes = {f"sys/class/kfd/kfd/topology/nodes/{n}/gpu_id": i for n, i in enumerate("075")}
    root = tree(tmp_path, {"dev/kfd": "", **nodes})
    found = find_accelerators(root, env, torch_is_rocm=True)
    assert (found.num_gpus, found.unusable) == (usable, ())
    found = find_accelerators(root, env, torch_is_rocm=False)
    assert found.num_gpus == 0
    assert "AMD" in found.unusable[0]


@pytest.mark.parametrize(("script", "usable"), [("echo GPU 0: A; echo GPU 1: B", 2), ("exit 9", 0)])
def test_gpus_under_wsl(tmp_path: Path, script: str, usable: int) -> None:
    """Under WSL the driver's own tool counts the GPUs."""
    tool = "usr/lib/wsl/lib/nvidia-smi"
    root = tree(tmp_path, {"dev/dxg": "", tool: f"#!/bin/sh\n{script}\n"})
    (root / tool).chmod(0o755)
    assert read_machine(root, {}).num_gpus == usable


@pytest.mark.parametrize(
    ("files", "word"),
    [
        ({"dev/neuron0": ""}, "Neuron"),
        ({"dev/davinci0": ""}, "Ascend"),
        ({"dev/hl0": ""}, "Gaudi"),
        (
            {
                "sys/bus/pci/devices/0000:03:00.0/class": "0x038000",
                "sys/bus/pci/devices/0000:03:00.0/vendor": "0x8086",
            },
            "Intel GPU",
        ),
    ],
)
def test_other_accelerators_are_named(tmp_path: Path, files: dict[str, str], word: str) -> None:
    """A plan that falls back to the CPU names the accelerator that it does not use."""
    machine = read_machine(tree(tmp_path, files), {})
    assert machine.num_gpus == 0
    _, plan = plan_recipe(resolve("digits"), (), machine)
    assert any(word in note for note in plan.notes)
    _, plan = plan_recipe(resolve("digits"), read_arguments(["device=cpu"]), machine)
    assert not any(word in note for note in plan.notes)


@pytest.mark.parametrize(
    ("models", "driver", "lacks"),
    [
        (["NVIDIA GeForce RTX 4090"] * 2, "535.104.05", True),
        (["NVIDIA GeForce RTX 4090"] * 2, "550.40.06", True),
        (["NVIDIA GeForce RTX 4090"] * 2, "550.40.07", False),
        (["NVIDIA GeForce RTX 4090"] * 2, "550.54", False),
        (["NVIDIA GeForce RTX 4090"], "535.104.05", False),
        (["NVIDIA GeForce RTX 4090", "NVIDIA A100-SXM4-40GB"], "535.104.05", True),
        (["NVIDIA H100 80GB HBM3"] * 8, "535.104.05", False),
        ([], "535.104.05", False),
    ],
)
def test_gpus_without_peer_access(
    tmp_path: Path, models: list[str], driver: str, lacks: bool
) -> None:
    """Several GPUs of the RTX 40 series with a driver before 550.40.07 have no peer access."""
    files = {
        f"proc/driver/nvidia/gpus/0000:0{index}:00.0/information": (
            f"Model: \t\t {model}\nIRQ:   \t\t 131\nGPU UUID: \t GPU-{index}\n"
        )
        for index, model in enumerate(models)
    }
    version = f"NVRM version: NVIDIA UNIX x86_64 Kernel Module  {driver}  Sat Aug 19\n"
    assert (
        lacks_peer_access(tree(tmp_path, files | {"proc/driver/nvidia/version": version})) is lacks
    )
