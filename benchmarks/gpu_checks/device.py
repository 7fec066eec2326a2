"""Checks of what a GPU is asked for: time, waits, contexts, memory."""

from __future__ import annotations

import json
import subprocess
from collections import Counter

from contest import HERE

from gpu_checks.machine import Machine, NotMeasurableError, Verdict, wait_until
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import read_heartbeat


def step_time(machine: Machine) -> Verdict:
    """Compare the recorded time of a step with CUDA events."""
    seconds = machine.probe("probes", "step_time")
    ratio = seconds["recorded"] / seconds["events"]
    return f"{ratio:.3f} of the time by CUDA events", "0.95 to 1.05", 0.95 <= ratio <= 1.05


def no_waits(machine: Machine) -> Verdict:
    """Train with torch's error for waits of the host switched on between two reads."""
    measured = machine.probe("probes", "waits")
    where, steps = measured["where"], measured["steps"]
    return f"{where or 'none'} in {steps} steps", "none", not where


def one_context(machine: Machine) -> Verdict:
    """Count the GPUs that each rank has opened after it has saved a checkpoint."""
    command = ["nvidia-smi", "--query-compute-apps=pid,gpu_uuid", "--format=csv,noheader"]
    with machine.started("digits", "contexts", "epochs=500", "checkpoint_every=20") as (
        process,
        out,
    ):
        wait_until(lambda: list_checkpoints(out), process)
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        beats = [read_heartbeat(out, rank) for rank in range(machine.ranks)]
    pids = {beat.pid for beat in beats if beat is not None}
    opened = Counter(int(line.split(",")[0]) for line in listed.splitlines() if line.strip())
    most = max((opened[pid] for pid in pids), default=0)
    if not most:  # as in a container
        raise NotMeasurableError("the driver does not list the processes of the ranks")
    return f"{most} contexts of a rank", "1", most == 1


def largest_batch(machine: Machine) -> Verdict:
    """Search for the largest micro-batch, until memory really runs out."""
    sizes = ("width=256", "size=128", "samples=65536", "batch=65536")
    memory: tuple[str, ...] = ()
    if machine.is_rehearsal:
        sizes = ("width=32", "size=32", "samples=4096", "batch=4096")
        memory = ("--memory", "700MiB")
    printed = machine.launcher(
        *("find", "batch", f"{HERE}/images.py", "-n", "1", "--json", "--fresh"),
        *memory,
        *("--out", "batch", f"device={machine.device}", *sizes),
        ok=(0, 1),
    )
    found = json.loads(printed)
    failed = sum(not trial["fits"] for trial in found["trials"])
    size = found["settings"].get("micro_batch_size")
    return f"{size} samples, {failed} trials ran out", "both > 0", bool(size and failed)


def profiled(machine: Machine) -> Verdict:
    """Profile a step: the backward pass takes longer than the forward pass."""
    printed = machine.launcher(
        *("profile", f"{HERE}/images.py", "-n", "1", "--steps", "5", "--json", "--out", "profile"),
        *("samples=2816", f"device={machine.device}"),
        *(("width=32", "size=32") if machine.is_rehearsal else ()),
    )
    [profile] = json.loads(printed)
    parts = profile["parts"]
    share = parts["other"] / profile["step_seconds"]
    text = (
        f"forward {parts['forward']:.1e} s, backward {parts['backward']:.1e} s, other {share:.0%}"
    )
    return text, "backward > forward > 0", parts["backward"] > parts["forward"] > 0


def diagnosed(machine: Machine) -> Verdict:
    """Run `launcher doctor`."""
    printed = machine.launcher(
        *("doctor", "-n", str(machine.ranks), "--device", machine.device, "--json"), ok=(0, 1)
    )
    levels = Counter(finding["level"] for finding in json.loads(printed)["findings"])
    text = ", ".join(f"{count} {level}" for level, count in sorted(levels.items()))
    return text, "no failure", not levels["failure"]
