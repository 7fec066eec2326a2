"""How often a start asks the file system, where launchers differ: one import a node, or one a rank.

    python benchmarks/opens.py

Python looks for each module in several places, so that importing torch is thousands of calls which
a shared file system answers one by one, for every process that imports. strace counts the calls
that name a file, of all processes of a short run; the rest follows from the ranks of a node.
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
    """Print calls by ranks, and what they come to on NODES x NPROC ranks."""
    if shutil.which("strace") is None:
        raise click.ClickException("strace, which counts them, is not installed.")
    rows: list[list[Cell]] = []
    with tempfile.TemporaryDirectory(prefix="opens-") as folder:
        for name in NAMES:
            found = [count(name, number, Path(folder)) for number in ranks]
            each = (found[-1] - found[0]) / max(ranks[-1] - ranks[0], 1)
            of_node = found[0] + each * (nproc - ranks[0])
            cells: list[Cell] = [(number, ",.0f") for number in found]
            rows.append(
                [TITLES.get(name, name), *cells, (each, ",.0f"), (of_node * nodes / 1e6, ",.2f")]
            )
    head = (
        "started by",
        *(f"{number} rank{'s' if number > 1 else ''}" for number in ranks),
        "for each rank",
        f"millions on {nodes} x {nproc}",
    )
    print_table(head, rows, title="calls that name a file")


def count(name: str, ranks: int, folder: Path) -> int:
    """Return the calls of a short run and all its processes.

    Raises:
        click.ClickException: It failed.
    """
    program, *arguments = (word.format(ranks=ranks) for word in STARTED_BY[name])
    said = folder / "calls.txt"
    out = folder / f"{name}-{ranks}"
    strace = ["strace", "-f", "--seccomp-bpf", "-qq", "-c", "-U", "calls", "-e", "trace=%file"]
    done = subprocess.run(
        [*strace, "-o", said, BIN / program, *arguments, "device=cpu", "--out", out],
        env={k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise click.ClickException(f"{done.stderr}\n{program} on {ranks} failed, see above.")
    return int(said.read_text().split()[-2])


if __name__ == "__main__":
    main()
