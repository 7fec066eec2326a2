"""`launcher doctor`: what it finds on this machine, how it judges what others may have."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support import Commands

from launcher.checks.doctor import plan_diagnostics
from launcher.checks.group_checks import judge
from launcher.checks.node_checks import check_node
from launcher.console.findings_table import finding_lines
from launcher.environment.machine import Machine, free_memory_bytes, gpu_driver
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
GOOD = RankDiagnostics(
    rank=0,
    node="node1",
    versions={"torch": "2.13.0", "driver": "570.1"},
    device="A100",
    device_memory=(79 << 30, 80 << 30),
    torchvision="",
    product_error=1e-4,
    flops=1e14,
    meeting_seconds=0.5,
    reduce_seconds=2e-5,
    reduce_bandwidth=2e11,
    sums_right=True,
)


def judged(**changes: Any) -> dict[str, Finding]:
    """Return the worst that is said of two good ranks, the second with changes, by check."""
    findings: dict[str, Finding] = {}
    for finding in judge([GOOD, replace(GOOD, rank=1, **changes)], PLAN):
        if findings.setdefault(finding.check, finding).level == "ok":
            findings[finding.check] = finding
    return findings


def node_findings(root: Path, machine: Machine = MACHINE, **more: Any) -> dict[str, Finding]:
    """Return what is said of a machine with the files below `root`, by check."""
    plan = plan_diagnostics(machine, **more)
    return {finding.check: finding for finding in check_node(plan, root / "runs", root)}


def test_this_machine(run: Commands) -> None:
    """It starts real ranks, finds nothing that would stop a run, and leaves nothing behind."""
    done = run("launcher", "doctor", "-n", "2", env={"TMPDIR": str(run.folder)})
    assert done.exit_code == 0, done.stdout + done.stderr
    assert ", 0 failures" in done.stdout
    for check in ("cores", "/dev/shm", "rendezvous    2 ranks met", "versions", "all-reduce"):
        assert check in done.stdout
    assert list(run.folder.glob("launcher-*")) == []


def test_json_has_the_measurements(run: Commands) -> None:
    """--json prints every finding and what each rank measured, and nothing else."""
    done = run("launcher", "doctor", "-n", "2", "--json")
    said = json.loads(done.stdout)
    assert [report["rank"] for report in said["ranks"]] == [0, 1]
    for report in said["ranks"]:
        assert 0 < report["product_error"] < 1e-5
        assert report["flops"] > 1e8
        assert 0 < report["reduce_seconds"] < 1
        assert report["sums_right"]
    assert {finding["level"] for finding in said["findings"]} <= {"ok", "warning"}


def test_started_as_ranks(run: Commands) -> None:
    """Under torchrun it examines the ranks that it is, and rank 0 tells."""
    command = ("torchrun", "--standalone", "--nproc-per-node", "2", "--no-python")
    done = run(*command, "launcher", "doctor")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("2 ranks met") == 1
    assert done.stdout.count("host memory") == 1, "its node's first rank looked at it"


def test_a_group_that_cannot_be_formed(run: Commands) -> None:
    """What a run would die of is a failure, with the reason and the log kept."""
    done = run("launcher", "doctor", "-n", "2", env={"GLOO_SOCKET_IFNAME": "nosuch0"})
    assert done.exit_code == 1
    assert "failure  ranks" in done.stdout
    assert "Unable to find address for: nosuch0" in done.stderr
    log = Path(done.stderr.rpartition("log: ")[2].partition(", line")[0])
    assert "nosuch0" in log.read_text()


def test_a_torchvision_that_does_not_load(run: Commands) -> None:
    """One that is there and does not load is named, on the rank that has it."""
    package = run.folder / "packages/torchvision"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('operator nms does not exist')")
    done = run("launcher", "doctor", "-n", "1", env={"PYTHONPATH": str(package.parent)})
    assert done.exit_code == 1
    assert "cannot import it: RuntimeError: operator nms does not exist" in done.stdout


def test_good_ranks_are_good() -> None:
    """Nothing is said of ranks that are as they should be."""
    assert worst(judged().values()) == "ok"


@pytest.mark.parametrize(
    ("changes", "check", "level", "found"),
    [
        ({"product_error": None}, "arithmetic", "failure", "rank 1 (node1): .* not finite"),
        ({"product_error": 0.3}, "arithmetic", "failure", "off by 3e-01"),
        ({"flops": 5e13}, "arithmetic", "warning", "rank 1 .* at 50% of the median"),
        ({"sums_right": False}, "all-reduce", "failure", "rank 1 .* wrong sum"),
        ({"reduce_bandwidth": 1e9}, "all-reduce", "warning", "1 GB/s"),
        ({"device": "V100"}, "devices", "warning", "1 x A100, 1 x V100"),
        ({"device_memory": (40 << 30, 80 << 30)}, "GPU memory", "warning", "40 GiB free of 80"),
        ({"versions": {"torch": "2.12.0", "driver": "570.1"}}, "versions", "failure", "2.12.0"),
        ({"versions": {"torch": "2.13.0"}}, "versions", "failure", "driver 570.1 and missing"),
        ({"torchvision": "RuntimeError: nms"}, "torchvision", "failure", "rank 1 .* nms"),
    ],
)
def test_what_is_wrong_with_a_rank(
    changes: dict[str, Any], check: str, level: str, found: str
) -> None:
    """Each thing that can be wrong with one of the ranks is found, named, and has a remedy."""
    finding = judged(**changes)[check]
    assert finding.level == level
    assert re.search(found.replace("(", r"\(").replace(")", r"\)"), finding.found)
    assert finding.remedy
    others = {name: each.level for name, each in judged(**changes).items() if name != check}
    assert set(others.values()) == {"ok"}


def test_what_is_wrong_with_a_node(tmp_path: Path) -> None:
    """Few cores, little memory, no /dev/shm, no driver: each has a remedy."""
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/meminfo").write_text("MemTotal: 2097152 kB\nMemAvailable: 1048576 kB\n")
    small = replace(MACHINE, usable_cores=3, cores_limited_by="cgroup CPU quota")
    found = node_findings(tmp_path, small)
    assert found["cores"].found == ("3 usable (cgroup CPU quota) for 2 ranks with 1 worker each")
    assert found["cores"].remedy.startswith("10 would do for 4 workers for each rank; ask")
    assert found["host memory"].level == "warning"
    assert found["host memory"].found == "1 GiB free of 64 GiB"
    assert found["/dev/shm"].level == "failure"
    assert found["driver"].level == "failure"
    assert all(each.remedy for each in found.values() if each.level != "ok")


def test_a_folder_that_cannot_be_written() -> None:
    """The nearest folder that exists is tried, with real bytes."""
    plan = plan_diagnostics(MACHINE)
    found = {each.check: each for each in check_node(plan, Path("/proc/none/runs"))}
    assert found["run folder"].level == "failure"
    assert found["run folder"].found.startswith("/proc cannot be written")


def test_the_driver_is_read(tmp_path: Path) -> None:
    """Its version is what the kernel module says, of either kind."""
    path = tmp_path / "proc/driver/nvidia/version"
    path.parent.mkdir(parents=True)
    path.write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.104.05  Sat Aug 19\n")
    assert gpu_driver(tmp_path) == "535.104.05"
    path.write_text("NVRM version: NVIDIA UNIX Open Kernel Module for x86_64  570.86.15  Release\n")
    assert gpu_driver(tmp_path) == "570.86.15"


def test_free_memory_of_a_cgroup(tmp_path: Path) -> None:
    """What a cgroup has left counts, files that it would give up included."""
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
    """Bytes are shown in three digits and a unit."""
    assert size(num_bytes) == text


def test_long_findings_stay_in_their_column() -> None:
    """Lines are at most 100 wide, and what follows is below what was found."""
    finding = Finding(check="versions", level="failure", found="word " * 40, remedy="do " * 60)
    lines = list(finding_lines(finding))
    assert max(map(len, lines)) <= 100
    assert all(line.startswith(" " * 25) for line in lines[1:])
    assert any(line.strip().startswith("-> do") for line in lines)
