"""Try launcher on the GPUs of this machine, and print one table with a row for each check.

    python benchmarks/gpu.py

It takes about ten minutes on one to eight GPUs and needs no data. Where there is no GPU that torch
can use, all checks are skipped and the exit code is 0. `--device cpu` tries the program itself on
CPU ranks, without the checks that need a GPU; speeds are then measured and not judged.
"""

from __future__ import annotations

import functools
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from contest import Names, benchmark, print_table
from gpu_checks import device, exactness, failures, speed
from gpu_checks.machine import Machine, NotMeasurableError, Verdict

HEAD = ("check", "ranks", "measured", "expected", "seconds", "result")
CPU_RANKS = 2
"""The number of ranks of a rehearsal."""


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    run: Callable[[Machine], Verdict]
    ranks: int = 1
    """The fewest ranks that it needs."""

    on_cpus: bool = True
    """Whether it can be tried on CPU ranks."""

    needs_bf16: bool = False
    """Whether it trains in bf16, which GPUs before the Ampere generation lack."""

    is_speed: bool = False
    """Whether it compares times, which mean nothing on CPU ranks."""


def against(name: str) -> Check:
    """Return the check that compares launcher with another loop."""
    return Check(functools.partial(speed.against, name=name), needs_bf16=True, is_speed=True)


CHECKS = {
    "same steps in fp32": Check(functools.partial(exactness.same_steps, precision="fp32")),
    "same steps in bf16": Check(
        functools.partial(exactness.same_steps, precision="bf16"), needs_bf16=True
    ),
    "NCCL and gloo": Check(exactness.same_as_gloo),
    "equal bits": Check(exactness.same_bits, ranks=2),
    "step time": Check(device.step_time, is_speed=True),
    "waits of the host": Check(device.no_waits, on_cpus=False),
    "contexts after a checkpoint": Check(device.one_context, on_cpus=False),
    "a rank is killed": Check(failures.killed_rank, ranks=2),
    "a rank hangs": Check(failures.named_hang, ranks=2),
    "stopped and resumed": Check(failures.stopped_and_resumed),
    "largest batch": Check(device.largest_batch),
    "pinned copies": Check(speed.pinned_copies, on_cpus=False),
    "pinned memory": Check(speed.pinned_memory, on_cpus=False),
    "workers": Check(speed.workers, is_speed=True),
    "loader overlap": Check(speed.loader_overlap, is_speed=True),
    "compiled": Check(speed.compiled, needs_bf16=True, is_speed=True),
    "bf16": Check(speed.mixed_precision, needs_bf16=True, is_speed=True),
    "profile": Check(device.profiled),
    "doctor": Check(device.diagnosed),
    "plain PyTorch loop": against("torch"),
    "Accelerate": against("accelerate"),
    "Lightning": against("lightning"),
}


def rows(machine: Machine, names: Sequence[str], reason: str) -> Iterator[list[str]]:
    """Make the checks, and yield a row of cells for each.

    Args:
        machine: The devices.
        names: The checks.
        reason: Why all checks are skipped; empty to make them.
    """
    for name in names:
        check = CHECKS[name]
        why = reason
        if not why and check.ranks > machine.ranks:
            why = f"it needs {check.ranks} ranks"
        if not why and machine.is_rehearsal and not check.on_cpus:
            why = "it needs a GPU"
        if not why and check.needs_bf16 and not (machine.is_rehearsal or has_bf16()):
            why = "this GPU has no bf16"
        started = time.monotonic()
        measured, expected, result = "", "", f"skipped: {why}"
        if not why:
            measured, expected, result = outcome(machine, name, check)
        seconds = f"{time.monotonic() - started:.0f}"
        yield [name, str(machine.ranks), measured, expected, seconds, result]


def has_bf16() -> bool:
    """Return whether the GPU has units for bf16."""
    return bool(torch.cuda.is_bf16_supported(including_emulation=False))


def outcome(machine: Machine, name: str, check: Check) -> tuple[str, str, str]:
    """Make a check; return what was measured, what was expected, and the result."""
    try:
        measured, expected, passed = check.run(machine)
    except NotMeasurableError as error:
        return "", "", f"skipped: {error}"
    except (click.ClickException, subprocess.SubprocessError, OSError, ValueError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return "an error, see above", "", "FAILED"
    if machine.is_rehearsal and check.is_speed:
        return measured, expected, "tried"
    return measured, expected, "passed" if passed else "FAILED"


@benchmark
@click.option(
    "--device", "kind", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True
)
@click.option("--only", type=Names(CHECKS), default=",".join(CHECKS), help="Checks to make.")
def main(kind: str, only: list[str]) -> None:
    """Make the checks, and exit with 1 if one of them fails."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = "" if available or kind == "cpu" else "there is no GPU that torch can use"
    name = torch.cuda.get_device_name(0) if available and kind == "cuda" else "CPU"
    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    machine = Machine(kind, CPU_RANKS if kind == "cpu" else available, folder)
    results: list[str] = []

    def recorded() -> Iterator[list[str]]:
        for row in rows(machine, only, reason):
            results.append(row[-1])
            yield row

    try:
        print_table(HEAD, recorded(), title=f"{machine.ranks} x {name}, torch {torch.__version__}")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if "FAILED" in results:
        raise click.ClickException(f"{results.count('FAILED')} of {len(results)} checks failed.")


if __name__ == "__main__":
    main()
