"""From Enter to the prompt: commands that only look, and those of other launchers.

    python benchmarks/commands.py

In turns, each turn in another order, after one that is not counted, with modules that are compiled,
as they are where packages are installed. `launcher submit --dry-run` is of a cluster that is asked;
without Slurm it is left out.
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
    """Print milliseconds of each command."""
    commands = [*OURS, *OTHERS]
    if has_cluster():
        commands.insert(len(OURS), SUBMIT)
    found: dict[str, list[float]] = {command: [] for command in commands}
    for turn in range(-1 if turns > 1 else 0, turns):
        first = turn % len(commands)
        for command in commands[first:] + commands[:first]:
            seconds = take(command)
            if turn >= 0:
                found[command].append(1e3 * seconds)
    rows: list[list[Cell]] = [
        [command, (median(times), ".0f"), (min(times), ".0f")] for command, times in found.items()
    ]
    print_table(("command", "ms", "least"), rows, title=f"medians of {turns}")


def has_cluster() -> bool:
    """Return whether Slurm is here and answers."""
    if shutil.which("sinfo") is None:
        return False
    return subprocess.run(["sinfo"], check=False, capture_output=True).returncode == 0


def take(command: str) -> float:
    """Return the seconds of a command.

    Raises:
        click.ClickException: It failed.
    """
    program, *arguments = command.split()
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    done = subprocess.run(
        [BIN / program, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - started
    if done.returncode:
        raise click.ClickException(f"{done.stderr}\n{command} failed, see above.")
    return seconds


if __name__ == "__main__":
    main()
