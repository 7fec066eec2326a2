"""Time commands that train nothing: those of launcher and the help pages of other launchers.

    python benchmarks/commands.py

Claim: `launcher --help` and `launcher plan` answer in a tenth of the time of `torchrun --help`. The
commands run in turns, each turn in another order, after a warm-up turn that is not counted, with
compiled modules, as in an installed package. `launcher submit --dry-run` asks a Slurm cluster and
is skipped if none answers.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from statistics import median

import click
from contest import BIN, Cell, benchmark, print_table

LARGE = "--nodes 1250 -n 8 --json device=cuda batch_size=80000 train_samples=1000000000"
OURS = (
    "launcher --help",
    "launcher recipes",
    "launcher run --help",
    "launcher plan digits",
    f"launcher plan digits {LARGE}",
)
SUBMIT = "launcher submit digits --dry-run"
OTHERS = ("torchrun --help", "accelerate launch --help", "deepspeed --help")


@benchmark
@click.option("--turns", type=click.IntRange(min=1), default=9, show_default=True)
def main(turns: int) -> None:
    """Print the milliseconds that each command takes."""
    commands = [*OURS, *OTHERS]
    if has_cluster():
        commands.insert(len(OURS), SUBMIT)
    milliseconds: dict[str, list[float]] = {command: [] for command in commands}
    for turn in range(-1 if turns > 1 else 0, turns):
        first = turn % len(commands)
        for command in commands[first:] + commands[:first]:
            seconds = time_command(command)
            if turn >= 0:
                milliseconds[command].append(1e3 * seconds)
    rows: list[list[Cell]] = [
        [command, (median(times), ".0f"), (min(times), ".0f")]
        for command, times in milliseconds.items()
    ]
    print_table(("command", "ms", "least"), rows, title=f"medians of {turns}")


def has_cluster() -> bool:
    """Return whether Slurm is installed and its controller answers."""
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], check=False, capture_output=True).returncode == 0


def time_command(command: str) -> float:
    """Run a command and return how many seconds it took.

    Raises:
        click.ClickException: The command failed.
    """
    program, *arguments = command.split()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.run(
        [BIN / program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if process.returncode:
        raise click.ClickException(f"{process.stderr}\n{command} failed, see above.")
    return seconds


if __name__ == "__main__":
    main()
