"""Try launcher on the GPUs of this machine, and print one table with a row for each check.

    python benchmarks/gpu.py

It takes about ten minutes on one to eight GPUs and needs no data. Where there is no GPU that torch
can use, all checks are skipped and the exit code is 0. `--device cpu` tries the program itself on
CPU ranks, without the checks that need a GPU.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
import torch
from contest import BIN, HERE, Names, benchmark, print_table

from launcher.engine.probes.parity import compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import read_heartbeat
from launcher.runs.rundir import RunDir

HEAD = ("check", "ranks", "measured", "expected", "result")
STRATEGIES = "ddp,fsdp,zero1,zero2,zero3"
TOLERANCES = {"fp32": 1e-3, "bf16": 5e-2}
"""Largest relative difference of losses and weights after 24 steps that counts as rounding."""

SECONDS_TO_END = 15
"""Longest time from the death of a rank to the end of the run."""

TURNS = 3
"""Runs of each kind in a comparison of speeds; they alternate, and the medians are compared."""


class NotMeasurableError(Exception):
    """A check cannot be made on this machine; the text is the reason."""


Verdict = tuple[str, str, bool]
"""What was measured, what was expected, and whether the check passed."""


@dataclass(frozen=True)
class Machine:
    """The devices of the checks, and the folder for their runs."""

    device: str
    ranks: int
    folder: Path

    def launcher(self, *arguments: str | Path, ok: Sequence[int] = (0,)) -> str:
        """Run a command of launcher and return its standard output.

        Args:
            arguments: The arguments.
            ok: Exit codes that are accepted.

        Raises:
            click.ClickException: It ended with another exit code; the message has its last lines.
        """
        command = [str(BIN / "launcher"), *map(str, arguments)]
        done = subprocess.run(command, cwd=self.folder, capture_output=True, text=True, check=False)
        if done.returncode not in ok:
            lines = [*done.stdout.splitlines(), *done.stderr.splitlines()][-15:]
            raise click.ClickException("\n".join([f"exit code {done.returncode}", *lines]))
        return done.stdout

    def train(self, recipe: str, out: str, *settings: str, ranks: int | None = None) -> RunDir:
        """Train a recipe on some ranks, all of them by default, and return the run folder."""
        count = str(ranks or self.ranks)
        device = f"device={self.device}"
        self.launcher("run", recipe, "-n", count, "-q", "--out", out, device, *settings)
        return RunDir(self.folder / out)

    @contextlib.contextmanager
    def started(
        self, recipe: str, out: str, *settings: str
    ) -> Iterator[tuple[subprocess.Popen[str], RunDir]]:
        """Start a run on all ranks, and kill what is left of it at the end."""
        command = [str(BIN / "launcher"), "run", recipe, "-n", str(self.ranks), "-q", "--out", out]
        process = subprocess.Popen(
            [*command, f"device={self.device}", *settings],
            cwd=self.folder,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            yield process, RunDir(self.folder / out)
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def wait_until(condition: Callable[[], object], process: subprocess.Popen[str]) -> None:
    """Wait until a condition holds.

    Raises:
        click.ClickException: The process ended before.
    """
    while not condition():
        if process.poll() is not None:
            raise click.ClickException(f"the run ended early:\n{process.communicate()[1][-2000:]}")
        time.sleep(0.05)


def steps_of(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the lines of a run's steps."""
    if not run_dir.metrics.exists():
        return []
    lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines if line.endswith("}")]
    return [row for row in rows if "loss" in row]


def speed_of(run_dir: RunDir) -> float:
    """Return the samples per second of the second half of a run."""
    rows = steps_of(run_dir)
    return float(median(row["samples_per_second"] for row in rows[len(rows) // 2 :]))


def worlds(machine: Machine) -> str:
    """Return powers of two up to the number of ranks, as `launcher prove` takes them."""
    powers = [1 << exponent for exponent in range(machine.ranks.bit_length())]
    return ",".join(map(str, sorted({*powers, machine.ranks})))


def same_steps(machine: Machine, precision: str) -> Verdict:
    """Compare the steps of digits on every number of GPUs under every strategy."""
    tolerance = TOLERANCES[precision]
    printed = machine.launcher(
        *("prove", "digits", "--worlds", worlds(machine), "--strategies", STRATEGIES),
        *("--steps", "24", "--tolerance", str(tolerance), "--json"),
        *("--out", f"prove-{precision}", f"precision={precision}", f"device={machine.device}"),
        ok=(0, 1),
    )
    proof = json.loads(printed)
    largest = max(row.get("weights") or 0.0 for row in proof["rows"])
    return f"weights differ by {largest:.1e}", f"at most {tolerance:g}", bool(proof["agree"])


def same_as_gloo(machine: Machine) -> Verdict:
    """Compare a run over NCCL with one on CPU ranks over gloo."""
    settings = ("epochs=2", "record_samples=true")
    on_devices = machine.train("digits", "nccl", *settings)
    on_cpus = Machine("cpu", machine.ranks, machine.folder).train("digits", "gloo", *settings)
    difference = compare(read_trace(on_cpus), read_trace(on_devices), TOLERANCES["fp32"])
    text = f"losses differ by {difference.loss:.1e}"
    return text, f"at most {TOLERANCES['fp32']:g}", difference.agrees


def probe(machine: Machine, name: str) -> dict[str, Any]:
    """Return what a function of gpu_probes.py measured, in a process of its own."""
    command = [sys.executable, str(HERE / "gpu_probes.py"), name]
    done = subprocess.run(command, cwd=machine.folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise click.ClickException(done.stderr[-2000:])
    measured: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return measured


def step_time(machine: Machine) -> Verdict:
    """Compare the recorded time of a step with CUDA events."""
    seconds = probe(machine, "step_time")
    ratio = seconds["recorded"] / seconds["events"]
    return f"{ratio:.3f} of the time by CUDA events", "0.95 to 1.05", 0.95 <= ratio <= 1.05


def no_waits(machine: Machine) -> Verdict:
    """Train with torch's check for waits of the host switched on between two reads."""
    measured = probe(machine, "waits")
    found, steps = measured["waits"], measured["steps"]
    return f"{found} waits in {steps} steps", "0 waits", found == 0


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


def killed_rank(machine: Machine) -> Verdict:
    """Measure the time from the death of a rank to the end of the run."""
    with machine.started("digits", "killed", "epochs=500") as (process, out):
        wait_until(lambda: len(steps_of(out)) > 3, process)
        beat = read_heartbeat(out, machine.ranks - 1)
        assert beat is not None
        os.kill(beat.pid, signal.SIGKILL)
        started = time.monotonic()
        process.communicate(timeout=120)
        seconds = time.monotonic() - started
    ends = process.returncode == 1 and seconds < SECONDS_TO_END
    return f"{seconds:.1f} s, exit code {process.returncode}", f"< {SECONDS_TO_END} s, 1", ends


def named_hang(machine: Machine) -> Verdict:
    """Let the last rank sleep in a step, and look whether the failure names it."""
    last = machine.ranks - 1
    recipe = HERE.parent / "tests/recipes/failing.py"
    settings = ("how=sleep", f"rank={last}")
    with machine.started(str(recipe), "hang", *settings) as (process, _):
        _, stderr = process.communicate(timeout=120)
    is_named = f"rank {last} " in stderr and "collective call" in stderr
    return "named" if is_named else "not named", f"rank {last} and its call", is_named


def stopped_and_resumed(machine: Machine) -> Verdict:
    """Stop a run by SIGTERM, and resume it on one rank."""
    with machine.started("digits", "stopped", "epochs=100") as (process, out):
        wait_until(lambda: len(steps_of(out)) > 3, process)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=120)
    step = list_checkpoints(out)[0].step
    machine.launcher("resume", "stopped", "-n", "1", "-q", f"steps={step + 12}")
    steps = json.loads(out.result.read_text())["steps"]
    passed = process.returncode == 75 and steps == step + 12
    return f"exit code {process.returncode}, then {steps} steps", f"75, then {step + 12}", passed


def largest_batch(machine: Machine) -> Verdict:
    """Search for the largest micro-batch, until memory really runs out."""
    sizes = ("width=256", "size=128", "samples=65536", "batch=65536")
    memory: tuple[str, ...] = ()
    if machine.device == "cpu":
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


def speeds(machine: Machine, *settings: str) -> list[float]:
    """Return the median samples per second with each of some settings, in turns."""
    common = (
        ("samples=4096", "epochs=2") if machine.device == "cuda" else ("samples=512", "size=16")
    )
    measured: dict[str, list[float]] = {setting: [] for setting in settings}
    for turn in range(TURNS if machine.device == "cuda" else 1):
        for setting in settings:
            out = f"speed-{setting.replace('=', '-')}-{turn}"
            run_dir = machine.train(f"{HERE}/images.py", out, *common, *setting.split())
            measured[setting].append(speed_of(run_dir))
    return [median(values) for values in measured.values()]


def pinned_memory(machine: Machine) -> Verdict:
    """Compare copies from pinned memory with copies from pageable memory."""
    pinned, pageable = speeds(machine, "pin_memory=true", "pin_memory=false")
    ratio = pinned / pageable
    return f"{ratio:.2f} times the samples per second", ">= 0.95", ratio >= 0.95


def workers(machine: Machine) -> Verdict:
    """Compare four DataLoader workers per rank with none."""
    four, none = speeds(machine, "num_workers=4", "num_workers=0")
    return f"{four / none:.2f} times the samples per second", "> 1", four > none


def compiled(machine: Machine) -> Verdict:
    """Compare compile=true with the same run without."""
    compiled, plain = speeds(machine, "compile=true precision=bf16", "precision=bf16")
    return f"{compiled / plain:.2f} times the samples per second", "> 0.9", compiled > 0.9 * plain


def mixed_precision(machine: Machine) -> Verdict:
    """Compare bf16 with fp32."""
    bf16, fp32 = speeds(machine, "precision=bf16", "precision=fp32")
    return f"{bf16 / fp32:.2f} times the samples per second", "> 1", bf16 > fp32


def profiled(machine: Machine) -> Verdict:
    """Profile a step: the backward pass takes longer than the forward pass."""
    printed = machine.launcher(
        *("profile", f"{HERE}/images.py", "-n", "1", "--steps", "5", "--json", "--out", "profile"),
        *("samples=2816", f"device={machine.device}"),
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


def plain_loop(machine: Machine) -> Verdict:
    """Compare the speed with that of a plain PyTorch loop on the same device."""
    measured = probe(machine, "plain_loop")
    ratio = measured["launcher"] / measured["plain"]
    return f"{ratio:.3f} of a plain loop's samples per second", ">= 0.95", ratio >= 0.95


@dataclass(frozen=True)
class Check:
    """One row of the table."""

    run: Callable[[Machine], Verdict]
    ranks: int = 1
    """The fewest ranks that it needs."""

    on_cpus: bool = True
    """Whether it can be tried on CPU ranks."""


CHECKS = {
    "same steps in fp32": Check(lambda machine: same_steps(machine, "fp32")),
    "same steps in bf16": Check(lambda machine: same_steps(machine, "bf16")),
    "NCCL and gloo": Check(same_as_gloo, on_cpus=False),
    "step time": Check(step_time, on_cpus=False),
    "waits of the host": Check(no_waits, on_cpus=False),
    "contexts after a checkpoint": Check(one_context, on_cpus=False),
    "a rank is killed": Check(killed_rank, ranks=2),
    "a rank hangs": Check(named_hang, ranks=2),
    "stopped and resumed": Check(stopped_and_resumed),
    "largest batch": Check(largest_batch),
    "pinned memory": Check(pinned_memory, on_cpus=False),
    "workers": Check(workers),
    "compiled": Check(compiled, on_cpus=False),
    "bf16": Check(mixed_precision, on_cpus=False),
    "profile": Check(profiled),
    "doctor": Check(diagnosed),
    "plain PyTorch loop": Check(plain_loop, on_cpus=False),
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
        if not why and machine.device == "cpu" and not check.on_cpus:
            why = "it needs a GPU"
        if why:
            yield [name, str(machine.ranks), "", "", f"skipped: {why}"]
            continue
        try:
            measured, expected, passed = check.run(machine)
        except NotMeasurableError as error:
            yield [name, str(machine.ranks), "", "", f"skipped: {error}"]
            continue
        except (click.ClickException, subprocess.SubprocessError, OSError, ValueError) as error:
            print(f"{name}: {error}", file=sys.stderr)
            yield [name, str(machine.ranks), "an error, see above", "", "FAILED"]
            continue
        verdict = "passed" if passed else "FAILED"
        yield [name, str(machine.ranks), measured, expected, verdict]


@benchmark
@click.option("--device", type=click.Choice(["cuda", "cpu"]), default="cuda", show_default=True)
@click.option("--only", type=Names(CHECKS), default=",".join(CHECKS), help="Checks to make.")
def main(device: str, only: list[str]) -> None:
    """Make the checks, and exit with 1 if one of them fails."""
    available = torch.cuda.device_count() if torch.cuda.is_available() else 0
    reason = "" if available or device == "cpu" else "there is no GPU that torch can use"
    name = torch.cuda.get_device_name(0) if available and device == "cuda" else "CPU"
    folder = Path(tempfile.mkdtemp(prefix="gpu-"))
    machine = Machine(device, 2 if device == "cpu" else available, folder)
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
