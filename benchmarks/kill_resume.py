"""Compare runs that are killed at random moments and resumed with an uninterrupted run.

    python benchmarks/kill_resume.py --trials 100

Claim: a killed and resumed run is bitwise equal to an uninterrupted one. Each run saves a
checkpoint after every step. SIGKILL ends one of its ranks, or all of its processes including
launcher, at a random moment, mostly during a save. The run is resumed and killed again up to
KILLS_PER_RUN times, and then finishes. Its samples, losses and weights must equal those of the
uninterrupted run bit for bit.
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
"""Upper limit in seconds of the random delay between an observed step and the kill."""


@benchmark
@click.option("--trials", type=click.IntRange(min=1), default=20, show_default=True)
@click.option("--ranks", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seed", type=int, default=0, show_default=True)
@click.option("--strategy", default="ddp", show_default=True)
def main(trials: int, ranks: int, seed: int, strategy: str) -> None:
    """Kill and resume runs, TRIALS times in all, and fail at the first difference."""
    rng = random.Random(seed)
    folder = Path(tempfile.mkdtemp(prefix="kill_resume-"))
    settings = (f"strategy={strategy}", "device=cpu")
    try:
        command = ["run", f"{HERE}/steady.py", "-n", str(ranks), *settings, "--out"]
        with started([*command, str(folder / "whole")]) as process:
            if process.wait() != 0:
                raise click.ClickException("The uninterrupted run failed, see above.")
        reference = read_trace(RunDir(folder / "whole"))
        num_kills = 0
        while num_kills < trials:
            out = folder / f"killed-{num_kills}"
            kills = min(KILLS_PER_RUN, trials - num_kills)
            steps = kill_and_resume([*command, str(out)], out, kills, ranks, rng)
            check_equal(reference, read_trace(RunDir(out)), out)
            num_kills += kills
            print(f"{num_kills} of {trials}: killed at steps {steps}, bitwise equal", flush=True)
        head = ("kills", "ranks", "strategy", "not bitwise equal")
        print_table(head, [[str(num_kills), str(ranks), strategy, "0"]], title="killed and resumed")
    finally:
        shutil.rmtree(folder)


def kill_and_resume(
    command: Sequence[str], out: Path, kills: int, ranks: int, rng: random.Random
) -> list[int]:
    """Run a command, kill and resume it, and let it finish.

    Args:
        command: Arguments of `launcher` that start the run.
        out: Run folder of the command.
        kills: Number of kills before the run may finish.
        ranks: Number of ranks of the run.
        rng: Source of the moments and of the killed ranks.

    Returns:
        The newest saved step at each kill.

    Raises:
        click.ClickException: The last attempt failed.
    """
    run_dir, steps_at_kill = RunDir(out), []
    for _ in range(kills):
        with started(command) as process:
            first_step = steps_taken(run_dir)
            wait_for(process, run_dir, first_step + 1 + rng.randrange(3))
            time.sleep(rng.random() * LONGEST_WAIT)
            steps_at_kill.append(steps_taken(run_dir))
            victim = rng.randrange(-1, ranks)
            with contextlib.suppress(ProcessLookupError):
                if victim < 0:
                    os.killpg(process.pid, signal.SIGKILL)
                else:
                    os.kill(pid_of(run_dir, victim), signal.SIGKILL)
            process.wait()
        if list_checkpoints(run_dir):
            command = ["resume", str(out), "--auto"]
        else:  # killed before the first checkpoint was complete: start from scratch
            shutil.rmtree(out, ignore_errors=True)
    with started(command) as process:
        if process.wait() != 0:
            raise click.ClickException(f"{out} could not be resumed, see above.")
    return steps_at_kill


@contextlib.contextmanager
def started(arguments: Sequence[str]) -> Iterator[subprocess.Popen[bytes]]:
    """Start launcher in a process group of its own, and kill what is left of the group."""
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
    """Wait until the run has saved `step` steps or has ended."""
    while steps_taken(run_dir) < min(step, LAST_STEP) and process.poll() is None:
        time.sleep(0.005)


def steps_taken(run_dir: RunDir) -> int:
    """Return the step of the newest checkpoint, complete or still being written."""
    names = [path.name for path in run_dir.checkpoints.glob("*step-*[0-9]")]
    return max((int(name.rpartition("-")[2]) for name in names), default=0)


def pid_of(run_dir: RunDir, rank: int) -> int:
    """Return the process id of a rank."""
    heartbeat = read_heartbeat(run_dir, rank)
    assert heartbeat is not None
    return heartbeat.pid


def check_equal(reference: Trace, resumed: Trace, out: Path) -> None:
    """Compare two runs bit for bit.

    Raises:
        click.ClickException: Samples, learning rates, losses, gradient norms or weights differ.
    """
    for name in ("samples", "lr", "items", "loss", "grad_norm"):
        if getattr(reference, name) != getattr(resumed, name):
            raise click.ClickException(f"{out}: {name} differ from those of the uninterrupted run.")
    for name, weight in reference.weights.items():
        if not torch.equal(weight, resumed.weights[name]):
            gap = (weight - resumed.weights[name]).abs().max().item()
            raise click.ClickException(f"{out}: {name} differs by {gap:.1e}.")


if __name__ == "__main__":
    main()
