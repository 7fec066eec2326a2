"""Runs that are killed at random moments and resumed, compared with one that never was.

    python benchmarks/kill_resume.py --trials 100

A run that saves a checkpoint after every step is started; SIGKILL ends one of its ranks or all of
its processes, launcher included, at a moment drawn at random, mostly while something is being
saved. It is resumed and killed again until it has had its share of kills, and then left to end. Its
samples, its losses and its weights have to be those of the run that was left alone, to the bit.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import click
import torch
from contest import BIN, HERE, benchmark, print_table

from launcher.engine.probes.parity import Trace, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.heartbeat import read_heartbeat
from launcher.runs.rundir import RunDir

KILLS_PER_RUN = 7
LAST_STEP = 40
LONGEST_WAIT = 0.15
"""Seconds after a step was seen, in which the kill comes."""


@benchmark
@click.option("--trials", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--strategy", default="ddp", show_default=True)
def main(trials: int, ranks: int, seed: int, strategy: str) -> None:
    """Kill and resume runs, TRIALS times in all, and fail where anything has been lost."""
    drawn = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    settings = (f"strategy={strategy}", "device=cpu")
    try:
        command = ["run", f"{HERE}/steady.py", "-n", str(ranks), *settings, "--out"]
        with started([*command, str(folder / "whole")]) as process:
            if process.wait() != 0:
                raise click.ClickException("The run that was left alone failed, see above.")
        wanted = read_trace(RunDir(folder / "whole"))
        done = 0
        while done < trials:
            out = folder / f"killed-{done}"
            kills = min(KILLS_PER_RUN, trials - done)
            steps = torment([*command, str(out)], out, kills, ranks, drawn)
            check(wanted, read_trace(RunDir(out)), out)
            done += kills
            print(f"{done} of {trials}: killed at steps {steps}, the same to the bit", flush=True)
        head = ("kills", "ranks", "strategy", "not the same to the bit")
        print_table(head, [[str(done), str(ranks), strategy, "0"]], title="killed and resumed")
    finally:
        shutil.rmtree(folder)


def torment(
    command: Sequence[str], out: Path, kills: int, ranks: int, drawn: random.Random
) -> list[int]:
    """Run `command` into `out` with some kills; return the steps that were seen before them."""
    run_dir, seen = RunDir(out), []
    for _ in range(kills):
        with started(command) as process:
            begun = steps_taken(run_dir)
            wait_for(process, run_dir, begun + 1 + drawn.randrange(3))
            time.sleep(drawn.random() * LONGEST_WAIT)
            seen.append(steps_taken(run_dir))
            victim = drawn.randrange(-1, ranks)
            with contextlib.suppress(ProcessLookupError):
                if victim < 0:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    os.kill(pid_of(run_dir, victim), signal.SIGKILL)
            process.wait()
        if list_checkpoints(run_dir):
            command = ["resume", str(out), "--auto"]
        else:  # killed before the first was whole: it begins anew
            shutil.rmtree(out, ignore_errors=True)
    with started(command) as process:
        if process.wait() != 0:
            raise click.ClickException(f"{out} could not be resumed, see above.")
    return seen


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start launcher with its processes in a group of their own; none is left behind."""
    process = subprocess.Popen(
        [str(BIN / "launcher"), *arguments], stdout=subprocess.DEVNULL, start_new_session=True
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def wait_for(process: subprocess.Popen[bytes], run_dir: RunDir, step: int) -> None:
    """Wait until the run has taken `step` steps, or has ended."""
    while steps_taken(run_dir) < min(step, LAST_STEP) and process.poll() is None:
        time.sleep(0.005)


def steps_taken(run_dir: RunDir) -> int:
    """Return the step of the newest checkpoint, or of the one that is being written."""
    names = [path.name for path in run_dir.checkpoints.glob("*step-*[0-9]")]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


def pid_of(run_dir: RunDir, rank: int) -> int:
    """Return the process of a rank."""
    health = read_heartbeat(run_dir, rank)
    assert health is not None
    return health.pid


def check(wanted: Trace, found: Trace, out: Path) -> None:
    """Compare to the bit.

    Raises:
        click.ClickException: Something differs.
    """
    for name in ("samples", "lr", "items", "loss", "grad_norm"):
        if getattr(wanted, name) != getattr(found, name):
            raise click.ClickException(f"{out}: {name} differ from the run that was left alone.")
    for name, weight in wanted.weights.items():
        if not torch.equal(weight, found.weights[name]):
            gap = (weight - found.weights[name]).abs().max().item()
            raise click.ClickException(f"{out}: {name} differs by {gap:.1e}.")


if __name__ == "__main__":
    main()
