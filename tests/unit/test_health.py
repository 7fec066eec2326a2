"""The health of GPUs and InfiniBand adapters, from a library and files that report faults."""

from __future__ import annotations

import os
import re
import signal
import time
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from fake_nvml import HEALTHY, FakeNvml, NVMLError

from launcher.checks import health_checks
from launcher.checks.health_checks import check_health, judge_gpus, judge_infiniband, judge_xids
from launcher.environment.gpu_health import GpuHealth, GpuReport, read_gpus
from launcher.environment.infiniband import read_infiniband
from launcher.environment.kernel_log import read_xids
from launcher.environment.within_time import call_within
from launcher.findings import Finding

SECOND: Mapping[str, Any] = {
    **HEALTHY,
    "nvmlDeviceGetUUID": "GPU-ffffffff-0000-0000-0000-000000000000",
    "nvmlDeviceGetPciInfo": SimpleNamespace(busId=b"00000001:AF:00.0"),
}


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Write files below a root and return it."""
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def findings_of(nvml: FakeNvml, root: Path) -> list[Finding]:
    """Return the findings about the GPUs of a library."""
    return list(judge_gpus(read_gpus(nvml=nvml, env={}, root=root)))


def test_healthy_gpus_pass(tmp_path: Path) -> None:
    """Two healthy GPUs give one finding for each check, and all of them are ok."""
    findings = findings_of(FakeNvml(HEALTHY, SECOND), tmp_path)
    assert {finding.level for finding in findings} == {"ok"}
    assert [finding.check for finding in findings] == [
        "ECC memory",
        "clocks",
        "power limit",
        "persistence",
        "PCIe",
        "NVLink",
        "GPU users",
    ]
    assert findings[5].found == "18 of 18 links active on 2 GPUs"


def process(pid: int, memory: int | None) -> SimpleNamespace:
    return SimpleNamespace(pid=pid, usedGpuMemory=memory)


FAULTS: list[tuple[dict[str, Any], str, str, str]] = [
    ({"nvmlDeviceGetTotalEccErrors": 3}, "ECC memory", "failure", "3 memory errors"),
    ({"nvmlDeviceGetRemappedRows": (0, 1, 0, 1)}, "ECC memory", "failure", "no spare"),
    ({"nvmlDeviceGetRemappedRows": (0, 1, 1, 0)}, "ECC memory", "warning", "next reset"),
    ({"nvmlDeviceGetRetiredPagesPendingStatus": 1}, "ECC memory", "warning", "next reset"),
    ({"nvmlDeviceGetCurrentClocksEventReasons": 0x4}, "clocks", "warning", "power cap"),
    ({"nvmlDeviceGetCurrentClocksEventReasons": 0x8}, "clocks", "warning", "hardware slowdown"),
    (
        {"nvmlDeviceGetCurrentClocksEventReasons": 0x60},
        "clocks",
        "warning",
        "temperature .software., temperature .hardware.",
    ),
    ({"nvmlDeviceGetCurrentClocksEventReasons": 0x80}, "clocks", "warning", "power brake"),
    (
        {
            "nvmlDeviceGetCurrentClocksEventReasons": NVMLError("Function Not Found"),
            "nvmlDeviceGetCurrentClocksThrottleReasons": 0x40,
        },
        "clocks",
        "warning",
        "hardware",
    ),
    ({"nvmlDeviceGetEnforcedPowerLimit": 450_000}, "power limit", "warning", "450 W.* 700 W"),
    ({"nvmlDeviceGetPersistenceMode": 0}, "persistence", "warning", "GPU 1$"),
    ({"nvmlDeviceGetCurrPcieLinkWidth": 8}, "PCIe", "warning", "8 of 16"),
    ({"nvmlDeviceGetCurrPcieLinkGeneration": 1}, "PCIe", "warning", "generation 1 .* 5"),
    ({"nvmlDeviceGetNvLinkState": [1] * 17 + [0]}, "NVLink", "warning", "17 .* 18 .*: 17$"),
    (
        {"nvmlDeviceGetComputeRunningProcesses": [process(77, 5 << 30)]},
        "GPU users",
        "warning",
        "77 .another container, 5 GiB.",
    ),
    ({"lost": NVMLError("GPU is lost")}, "GPU health", "failure", "GPU 1 .*lost"),
]


@pytest.mark.parametrize(("changes", "check", "level", "pattern"), FAULTS)
def test_each_fault_of_a_gpu_is_found(
    tmp_path: Path, changes: dict[str, Any], check: str, level: str, pattern: str
) -> None:
    """A fault of one of two GPUs gives one finding that names it, with a remedy."""
    findings = findings_of(FakeNvml(HEALTHY, {**SECOND, **changes}), tmp_path)
    (finding,) = [finding for finding in findings if finding.level != "ok"]
    assert (finding.check, finding.level) == (check, level)
    assert re.search(pattern, finding.found)
    assert "GPU 1" in finding.found
    assert finding.remedy


def test_an_idle_gpu_may_slow_its_link_down(tmp_path: Path) -> None:
    """A lower generation of PCIe in a low performance state is not a fault."""
    idle = {"nvmlDeviceGetCurrPcieLinkGeneration": 1, "nvmlDeviceGetPerformanceState": 8}
    assert {f.level for f in findings_of(FakeNvml({**HEALTHY, **idle}), tmp_path)} == {"ok"}


def test_gpus_without_a_bridge_pass(tmp_path: Path) -> None:
    """Links that are inactive on all GPUs of a kind are not a fault."""
    idle = {"nvmlDeviceGetNvLinkState": [0] * 12}
    findings = findings_of(FakeNvml({**HEALTHY, **idle}, {**SECOND, **idle}), tmp_path)
    assert {finding.level for finding in findings} == {"ok"}


def test_a_driver_that_supports_nothing_is_no_fault(tmp_path: Path) -> None:
    """Where every function raises, every value is missing and nothing is a fault."""
    nvml = FakeNvml({})
    assert read_gpus(nvml=nvml, env={}, root=tmp_path).gpus == (GpuHealth(index=0),)
    assert {finding.level for finding in findings_of(nvml, tmp_path)} == {"ok"}


def test_a_library_that_cannot_be_asked_is_a_warning(tmp_path: Path) -> None:
    """The reason for which the library does not start is in one warning."""
    nvml = FakeNvml(error=NVMLError("Driver/library version mismatch"))
    (finding,) = findings_of(nvml, tmp_path)
    assert finding.level == "warning"
    assert "Driver/library version mismatch" in finding.found


def test_processes_are_named_and_siblings_left_out(tmp_path: Path) -> None:
    """Another user's process is named; ranks that the same launcher has started are left out."""
    write(
        tmp_path,
        {
            "proc/70/comm": "python\n",
            "proc/70/stat": "70 (python) S 1 70 70",
            "proc/71/comm": "rank (1)\n",
            "proc/71/stat": "71 (rank (1)) S 60 71 71",
        },
    )
    found = [process(70, None), process(71, 9 << 30), process(900, 1 << 20)]
    nvml = FakeNvml({**HEALTHY, "nvmlDeviceGetComputeRunningProcesses": found})
    report = read_gpus(nvml=nvml, env={}, root=tmp_path, without_children_of=60)
    assert [(p.pid, p.name) for p in report.gpus[0].processes or ()] == [
        (70, "python"),
        (900, None),
    ]
    texts = [f.found for f in judge_gpus(report) if f.level == "warning"]
    assert len(texts) == 1
    assert texts[0].endswith("used by process 70 (python)")


@pytest.mark.parametrize(
    ("visible", "indices"),
    [
        ("1", [1]),
        ("1,0", [1, 0]),
        ("GPU-ffff", [1]),
        ("0,7,1", [0]),
        ("", []),
        ("MIG-1234", [0, 1]),
    ],
)
def test_hidden_gpus_are_not_examined(tmp_path: Path, visible: str, indices: list[int]) -> None:
    """CUDA_VISIBLE_DEVICES chooses GPUs by index or identity up to the first unknown one."""
    nvml = FakeNvml(HEALTHY, SECOND)
    report = read_gpus(nvml=nvml, env={"CUDA_VISIBLE_DEVICES": visible}, root=tmp_path)
    assert [gpu.index for gpu in report.gpus] == indices
    addresses = {0: "0000:3b:00.0", 1: "0001:af:00.0"}
    hidden = [address for index, address in addresses.items() if index not in indices]
    assert list(report.hidden) == hidden


def test_the_functions_exist_in_the_library() -> None:
    """The installed pynvml has every function that is asked for."""
    pynvml = pytest.importorskip("pynvml")
    names = [*HEALTHY, "nvmlDeviceGetRetiredPagesPendingStatus", "nvmlInit", "nvmlShutdown"]
    names += ["nvmlDeviceGetCount", "nvmlDeviceGetHandleByIndex"]
    names.append("nvmlDeviceGetCurrentClocksThrottleReasons")
    assert [name for name in names if not hasattr(pynvml, name)] == []


LOG = (
    "6,1,1,-;usb 1-1: new device\n"
    "4,2,2,-;NVRM: Xid (PCI:0000:3b:00): 31, pid=5, name=python, MMU Fault\n"
    "4,3,3,-;NVRM: Xid (PCI:0001:AF:00): 94, pid=6, name=python, Contained: SM (0x1)\n"
    "4,4,4,-;NVRM: Xid (PCI:0001:AF:00): 79, GPU has fallen off the bus.\n"
)


def test_errors_of_the_hardware_are_found_in_the_kernel_log(tmp_path: Path) -> None:
    """Xid errors are read with number and address; those that programs cause are no fault."""
    xids = read_xids(write(tmp_path, {"dev/kmsg": LOG}))
    assert xids is not None
    assert [(xid.number, xid.pci_address) for xid in xids] == [
        (31, "0000:3b:00"),
        (94, "0001:af:00"),
        (79, "0001:af:00"),
    ]
    (finding,) = judge_xids(xids, GpuReport())
    assert finding.level == "warning"
    assert re.search(r"0001:af:00 had Xid 94 .*79 .*fallen off the bus", finding.found)
    (own,) = judge_xids(xids, GpuReport(hidden=("0001:af:00.0",)))
    assert (own.check, own.level) == ("Xid errors", "ok")


def test_the_journal_is_read_where_the_log_is_not(tmp_path: Path) -> None:
    """Without /dev/kmsg the journal is asked; where neither tells anything, that is said."""
    assert read_xids(tmp_path) is None
    journal = write(tmp_path, {"usr/bin/journalctl": f"#!/bin/sh\ncat <<'END'\n{LOG}END\n"})
    (tmp_path / "usr/bin/journalctl").chmod(0o755)
    assert [xid.number for xid in read_xids(journal) or ()] == [31, 94, 79]
    write(tmp_path, {"usr/bin/journalctl": "#!/bin/sh\nexit 1\n"})
    assert read_xids(tmp_path) is None
    (finding,) = judge_xids(None, None)
    assert finding.level == "ok"
    assert finding.found.startswith("unknown")


def port(root: Path, name: str, state: str, rate: str, layer: str = "InfiniBand") -> None:
    """Write the files of the first port of an adapter."""
    folder = f"sys/class/infiniband/{name}/ports/1"
    files = {"state": state, "rate": rate, "link_layer": layer}
    write(root, {f"{folder}/{file}": f"{text}\n" for file, text in files.items()})


@pytest.mark.parametrize(
    ("ports", "levels", "pattern"),
    [
        ([], [], ""),
        ([("4: ACTIVE", "400 Gb/sec (4X NDR)")] * 2, ["ok"], "2 of 2 .* 2 x 400 Gb/s"),
        ([("4: ACTIVE", "400 Gb/sec"), ("1: DOWN", "40 Gb/sec")], ["ok"], "1 of 2 ports"),
        ([("1: DOWN", "40 Gb/sec")], ["warning"], "none of 1 port"),
        ([("4: ACTIVE", "400 Gb/sec"), ("2: INIT", "400 Gb/sec")], ["warning", "ok"], "INIT"),
        (
            [("4: ACTIVE", "400 Gb/sec"), ("4: ACTIVE", "100 Gb/sec")],
            ["warning", "ok"],
            "mlx5_1 runs at 100 Gb/s, and others at 400",
        ),
    ],
)
def test_infiniband_ports(
    tmp_path: Path, ports: list[tuple[str, str]], levels: list[str], pattern: str
) -> None:
    """States and rates of ports are read from /sys; slow, half-started and dead ones are found."""
    for number, (state, rate) in enumerate(ports):
        port(tmp_path, f"mlx5_{number}", state, rate)
    findings = list(judge_infiniband(read_infiniband(tmp_path)))
    assert [finding.level for finding in findings] == levels
    if findings:
        assert re.search(pattern, findings[0].found)


def test_a_driver_that_does_not_answer_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A library that never returns is given up after a limit of time."""
    monkeypatch.setattr(health_checks, "_SECONDS_FOR_DRIVER", 0.3)

    def hang() -> GpuReport:
        time.sleep(60)
        return GpuReport()

    started = time.monotonic()
    findings = list(check_health(tmp_path, read=hang))
    assert time.monotonic() - started < 5
    assert [(f.check, f.level) for f in findings] == [
        ("GPU health", "failure"),
        ("Xid errors", "ok"),
    ]


def test_values_come_back_from_the_other_process() -> None:
    """What the library told survives the way out of the process that asked it."""
    report = read_gpus(nvml=FakeNvml(HEALTHY, SECOND), env={})
    assert call_within(30, lambda: report, GpuReport) == report


def test_a_process_that_dies_has_no_result() -> None:
    """A crash inside a driver, or an exception, is the same as no answer."""

    def crash() -> GpuReport:
        os.kill(os.getpid(), signal.SIGKILL)
        return GpuReport()

    assert call_within(30, crash, GpuReport) is None
    assert call_within(30, lambda: 1 / 0, float) is None
