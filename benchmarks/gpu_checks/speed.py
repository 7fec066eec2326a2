"""Checks of speed: settings against each other, and launcher against other loops."""

from __future__ import annotations

from statistics import median
from typing import Any

from contest import HERE

from gpu_checks.machine import Machine, Verdict, second_half, speed_of
from launcher.analysis.device_peaks import peak_flops

TURNS = 3
"""Runs of each kind in a comparison of settings; they alternate, and the medians are compared."""

CONTEST_TURNS = 2
"""Runs of each loop in the comparison with other loops, of which the faster ones are compared."""


def speeds(machine: Machine, name: str, *settings: str) -> list[float]:
    """Return the median samples per second with each of some settings, in turns.

    Args:
        machine: The machine.
        name: What is compared, for the names of the run folders.
        settings: Settings, separated by spaces, for each kind of run.
    """
    common: tuple[str, ...] = ("samples=4096", "epochs=2")
    if machine.is_rehearsal:
        common = ("samples=256", "size=16", "width=8", "batch=64")
    measured: dict[str, list[float]] = {setting: [] for setting in settings}
    for turn in range(1 if machine.is_rehearsal else TURNS):
        for setting in settings:
            out = f"{name}-{settings.index(setting)}-{turn}"
            run_dir = machine.train(f"{HERE}/images.py", out, *common, *setting.split())
            measured[setting].append(speed_of(run_dir))
    return [median(values) for values in measured.values()]


def compared(speed: float, base: float, *, least: float) -> Verdict:
    """Return the verdict over a speed against another one."""
    ratio = speed / base
    return f"{ratio:.2f} times the samples per second", f">= {least:g}", ratio >= least


def pinned_memory(machine: Machine) -> Verdict:
    """Compare a training with copies from pinned memory with one from pageable memory."""
    return compared(*speeds(machine, "pinned", "pin_memory=true", "pin_memory=false"), least=0.95)


def pinned_copies(machine: Machine) -> Verdict:
    """Compare single copies from pinned memory with copies from pageable memory."""
    measured = machine.probe("probes", "copies")
    pinned, pageable = measured["pinned"] / 1e9, measured["pageable"] / 1e9
    text = f"pinned {pinned:.1f} GB/s, pageable {pageable:.1f} GB/s"
    return text, "pinned > pageable", pinned > pageable


def workers(machine: Machine) -> Verdict:
    """Compare four DataLoader workers per rank with none."""
    return compared(*speeds(machine, "workers", "num_workers=4", "num_workers=0"), least=1.0)


def loader_overlap(machine: Machine) -> Verdict:
    """Measure the share of a step in which a rank waits for data that workers read ahead."""
    sizes = ("samples=128", "batch=32", "width=8", "size=16") if machine.is_rehearsal else ()
    run_dir = machine.train(f"{HERE}/images.py", "overlap", "epochs=2", "num_workers=4", *sizes)
    rows = second_half(run_dir)
    waits = sum(row["data_wait_seconds"] for row in rows)
    share = waits / sum(row["step_seconds"] for row in rows)
    return f"waits for data in {share:.1%} of the time", "<= 5%", share <= 0.05


def compiled(machine: Machine) -> Verdict:
    """Compare compile=true with the same run without."""
    return compared(
        *speeds(machine, "compiled", "compile=true precision=bf16", "precision=bf16"),
        least=0.9,
    )


def mixed_precision(machine: Machine) -> Verdict:
    """Compare bf16 with fp32."""
    return compared(*speeds(machine, "bf16", "precision=bf16", "precision=fp32"), least=1.0)


def against(machine: Machine, name: str) -> Verdict:
    """Compare launcher with another loop that takes the same steps in bf16 on one GPU.

    Args:
        machine: The machine.
        name: A key of `contest.CONTESTANTS`.
    """
    measured: dict[str, list[dict[str, Any]]] = {name: [], "launcher": []}
    device_name = ""
    for _ in range(1 if machine.is_rehearsal else CONTEST_TURNS):
        for loop, results in measured.items():
            result = machine.probe("loops", loop)
            device_name = result["device_name"]
            results.append(result)
    best = {
        loop: max(result["samples_per_second"] for result in results)
        for loop, results in measured.items()
    }
    ratio = best["launcher"] / best[name]
    peak = peak_flops(device_name, "bf16", tf32=False)
    flops = measured["launcher"][0]["flops_per_sample"]
    mfu = "unknown peak" if peak is None else f"MFU {best['launcher'] * flops / peak:.0%}"
    text = f"{ratio:.3f} of the samples per second; {mfu}"
    return text, ">= 0.95", ratio >= 0.95
