"""`launcher doctor` examines this machine; its rules are tested on synthetic diagnostics."""

from __future__ import annotations

import re
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from launcher.checks.doctor import plan_diagnostics
from launcher.checks.group_checks import check_group
from launcher.checks.node_checks import check_node
from launcher.console.findings_table import finding_lines
from launcher.engine.rank_process import diagnose
from launcher.environment.machine import Machine, free_memory_bytes, gpu_driver, read_machine
from launcher.environment.world import World
from launcher.findings import Finding, RankDiagnostics, worst
from launcher.quantities import size

MACHINE = Machine(
    hostname="node1",
    num_gpus=2,
    usable_cores=16,
    cores_limited_by="cores of this machine",
    memory_bytes=64 << 30,
    shm_bytes=32 << 30,
)

PLAN = plan_diagnostics(MACHINE)

HEALTHY = RankDiagnostics(
    rank=0,
    node="node1",
    versions={"torch": "2.13.0", "driver": "570.1"},
    device="A100",
    device_memory=(79 << 30, 80 << 30),
    torchvision="",
    product_error=1e-4,
    flops=1e14,
    rendezvous_seconds=0.5,
    reduce_seconds=2e-5,
    reduce_bandwidth=2e11,
    sums_correct=True,
)


def worst_findings(**changes: Any) -> dict[str, Finding]:
    """Return the worst finding of each check about two healthy ranks, the second changed."""
    findings: dict[str, Finding] = {}
    for finding in check_group([HEALTHY, replace(HEALTHY, rank=1, **changes)], PLAN):
        if findings.setdefault(finding.check, finding).level == "ok":
            findings[finding.check] = finding
    return findings


def node_findings(root: Path, machine: Machine = MACHINE) -> dict[str, Finding]:
    """Return the finding of each check about a machine with the system files below `root`."""
    plan = plan_diagnostics(machine)
    return {finding.check: finding for finding in check_node(plan, root / "runs", root)}


def test_healthy_ranks_pass() -> None:
    """Healthy ranks give no warning and no failure."""
    assert worst(worst_findings().values()) == "ok"


@pytest.mark.parametrize(
    ("changes", "check", "level", "pattern"),
    [
        ({"product_error": None}, "arithmetic", "failure", "rank 1 (node1): .* not finite"),
        ({"product_error": 0.3}, "arithmetic", "failure", "off by 3e-01"),
        ({"flops": 5e13}, "arithmetic", "warning", "rank 1 .* at 50% of the median"),
        ({"sums_correct": False}, "all-reduce", "failure", "rank 1 .* sum"),
        ({"reduce_bandwidth": 1e9}, "all-reduce", "warning", "1 GB/s"),
        ({"device": "V100"}, "devices", "warning", "1 x A100, 1 x V100"),
        ({"device_memory": (40 << 30, 80 << 30)}, "GPU memory", "warning", "40 GiB free of 80"),
        ({"versions": {"torch": "2.12.0", "driver": "570.1"}}, "versions", "failure", "2.12.0"),
        ({"versions": {"torch": "2.13.0"}}, "versions", "failure", "driver 570.1 and missing"),
        ({"torchvision": "RuntimeError: nms"}, "torchvision", "failure", "rank 1 .* nms"),
    ],
)
def test_each_defect_of_a_rank_is_found(
    changes: dict[str, Any], check: str, level: str, pattern: str
) -> None:
    """A defect of one rank gives one finding, with its rank or numbers and a remedy."""
    finding = worst_findings(**changes)[check]
    assert finding.level == level
    assert re.search(pattern.replace("(", r"\(").replace(")", r"\)"), finding.found)
    assert finding.remedy
    others = [other for name, other in worst_findings(**changes).items() if name != check]
    assert {other.level for other in others} == {"ok"}


def test_each_defect_of_a_node_is_found(tmp_path: Path) -> None:
    """Few cores, little memory, no /dev/shm and no driver each give a finding with a remedy."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\n")
    small = replace(MACHINE, usable_cores=3, cores_limited_by="cgroup CPU quota")
    findings = node_findings(tmp_path, small)
    assert findings["cores"].found == "3 usable (cgroup CPU quota) for 2 ranks with 1 worker each"
    assert findings["cores"].remedy.startswith("10 cores")
    assert "batch system" in findings["cores"].remedy
    assert findings["host memory"].level == "warning"
    assert findings["host memory"].found == "1 GiB free of 64 GiB"
    assert findings["/dev/shm"].level == "failure"
    assert findings["driver"].level == "failure"
    assert all(finding.remedy for finding in findings.values() if finding.level != "ok")


def test_an_unwritable_folder_is_a_failure() -> None:
    """The nearest existing parent of the run folder is tested by writing to it."""
    plan = plan_diagnostics(MACHINE)
    findings = {finding.check: finding for finding in check_node(plan, Path("/proc/none/runs"))}
    assert findings["run folder"].level == "failure"
    assert findings["run folder"].found.startswith("/proc cannot be written")


def test_the_driver_is_read(tmp_path: Path) -> None:
    """The driver version is read from the proprietary and from the open kernel module."""
    path = tmp_path / "proc/driver/nvidia/version"
    path.parent.mkdir(parents=True)
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert gpu_driver(tmp_path) == "535.104.05"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    assert gpu_driver(tmp_path) == "570.86.15"


@pytest.mark.parametrize(
    ("files", "driver"),
    [
        ({"dev/kfd": ""}, "amdgpu"),
        ({"dev/kfd": "", "sys/module/amdgpu/version": "6.12.12\n"}, "amdgpu 6.12.12"),
        ({"dev/dxg": ""}, "of Windows"),
        ({"dev/null": ""}, None),
    ],
)
def test_drivers_of_amd_and_of_windows_count(
    tmp_path: Path, files: dict[str, str], driver: str | None
) -> None:
    """Machines with AMD's driver, and those under WSL 2, are not told to load NVIDIA's."""
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert gpu_driver(tmp_path) == driver


def test_free_memory_of_a_cgroup(tmp_path: Path) -> None:
    """Free memory is limited by the cgroup, whose inactive file pages count as free."""
    for name, text in {
        "proc/meminfo": "MemAvailable: 1000 kB\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "9000\n",
        "sys/fs/cgroup/job/memory.current": "8000\n",
        "sys/fs/cgroup/job/memory.stat": "anon 3000\ninactive_file 500\n",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    assert free_memory_bytes(tmp_path) == 1500


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 bytes"), (999, "999 bytes"), (1000, "0.977 KiB"), (64 << 20, "64 MiB")],
)
def test_sizes(num_bytes: int, text: str) -> None:
    """Sizes are printed with three significant digits and a binary unit."""
    assert size(num_bytes) == text


def test_long_findings_stay_in_their_column() -> None:
    """Lines have at most 100 characters, and continuation lines are indented to the column."""
    finding = Finding(check="versions", level="failure", found="word " * 40, remedy="do " * 60)
    lines = list(finding_lines(finding))
    assert max(map(len, lines)) <= 100
    assert all(line.startswith(" " * 25) for line in lines[1:])
    assert any(line.strip().startswith("-> do") for line in lines)


def test_each_stage_has_a_time_budget_of_its_own() -> None:
    """A rank reports after the start of its device, the rendezvous and each measurement."""
    plan = plan_diagnostics(read_machine(), device="cpu", nproc_per_node=1)
    stages: list[float] = []
    num_threads = torch.get_num_threads()
    try:
        (report,) = diagnose(plan, World(), (), lambda: stages.append(time.monotonic()))
    finally:
        torch.set_num_threads(num_threads)
    assert report.device_memory is None
    assert len(stages) == 5


def test_doctor_shows_the_binding() -> None:
    """Ranks are listed with their CPUs; one that should be bound and is not is a warning."""
    reports = [
        replace(HEALTHY, numa_node=0, cpus="0-7"),
        replace(HEALTHY, rank=1, numa_node=0, cpus="0-7"),
        replace(HEALTHY, rank=2, numa_node=1, unbound="reasons"),
    ]
    findings = [f for f in check_group(reports, PLAN) if f.check == "CPU binding"]
    assert [finding.level for finding in findings] == ["warning", "ok"]
    assert findings[0].found == "rank 2 (node1) is not bound to a NUMA node: reasons"
    assert findings[1].found == "ranks 0, 1 on NUMA node 0, CPUs 0-7"
    assert [f for f in check_group([HEALTHY], PLAN) if f.check == "CPU binding"] == []
