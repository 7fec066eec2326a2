"""Count the file system calls of a launch, under launcher and under torchrun.

    python benchmarks/opens.py

Claim: a rank of launcher costs the file system a fraction of what a rank of torchrun costs, because
launcher imports torch once per node and torchrun once per rank. Python looks for each module in
several places, so that importing torch makes thousands of calls that a shared file system answers
one by one. strace counts the calls with a file name in all processes of a short run; the table
extrapolates them to a cluster.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import click
from contest import BIN, Cell, Numbers, benchmark, print_table
from launch import STARTED_BY, TITLES

NAMES = ("launcher", "torchrun")


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--nodes", type=click.IntRange(min=1), default=64, show_default=True)
@click.option("--nproc", type=click.IntRange(min=1), default=8, show_default=True)
def main(ranks: list[int], nodes: int, nproc: int) -> None:
    """Print the calls by number of ranks, extrapolated to NODES x NPROC ranks."""
    if shutil.which("strace") is None:
        raise click.ClickException(
            "strace, which counts the calls, is not installed. As root: apt-get install strace"
        )
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory(prefix="opens-") as folder:
        for name in NAMES:
            counts = [count_calls(name, num_ranks, Path(folder)) for num_ranks in ranks]
            per_rank = (counts[-1] - counts[0]) / max(ranks[-1] - ranks[0], 1)
            per_node = counts[0] + per_rank * (nproc - ranks[0])
            millions = per_node * nodes / 1e6
            cells: list[Cell] = [(count, ",.0f") for count in counts]
            rows.append([TITLES.get(name, name), *cells, (per_rank, ",.0f"), (millions, ",.2f")])
    head = (
        "started by",
        *(f"{num_ranks} rank{'s' if num_ranks > 1 else ''}" for num_ranks in ranks),
        "per rank",
        f"millions on {nodes} x {nproc}",
    )
    print_table(head, rows, title="calls that name a file")


def count_calls(name: str, ranks: int, folder: Path) -> int:
    """Run a launcher under strace and return the calls of all its processes.

    Raises:
        click.ClickException: The run failed.
    """
    program, *arguments = (word.format(ranks=ranks) for word in STARTED_BY[name])
    summary = folder / "calls.txt"
    out = folder / f"{name}-{ranks}"
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-c", "-U", "calls", "-e", "trace=%file"]
    process = subprocess.run(
        [*strace, "-o", summary, BIN / program, *arguments, "device=cpu", "--out", out],
        env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if process.returncode:
        raise click.ClickException(f"{process.stderr}\n{program} on {ranks} failed, see above.")
    return int(summary.read_text().split()[-2])


if __name__ == "__main__":
    main()
