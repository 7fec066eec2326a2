"""From Enter to the first optimizer step and to the end: launcher run against the launchers.

    python benchmarks/launch.py

Each starts the same recipe file, first_step.py, which takes five steps on a small net; torchrun
also starts a plain PyTorch loop over the same data, with nothing of launcher's engine in it. They
take turns, each turn in another order; a ratio is the median of the turns' own.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from operator import attrgetter, truediv
from pathlib import Path
from statistics import median
from typing import NamedTuple

import click
from contest import BIN, HERE, Cell, Names, Numbers, benchmark, print_table

RECIPE = str(HERE / "first_step.py")
PLAIN = (str(HERE / "frameworks.py"), "torch", RECIPE, "--batch-size", "32")
_ACCELERATE = ("accelerate", "launch", "--main_process_port", "0", "--num_processes", "{ranks}")
STARTED_BY = {
    "torchrun": ("torchrun", "--standalone", "--nproc-per-node", "{ranks}", RECIPE),
    "launcher": ("launcher", "run", RECIPE, "-n", "{ranks}"),
    "plain": ("torchrun", "--standalone", "--nproc-per-node", "{ranks}", *PLAIN),
    "accelerate": (*_ACCELERATE, RECIPE),
    "deepspeed": ("deepspeed", "--num_accelerators", "{ranks}", RECIPE),
}
TITLES = {
    "launcher": "launcher run",
    "plain": "torchrun, plain PyTorch loop",
    "accelerate": "accelerate launch",
}
"""Of those that are not called what they are typed as."""


HEAD = ("started by", "s to the first step", "ratio", "s to exit", "ratio", "CPU s", "ratio")


class Took(NamedTuple):
    """Seconds of a run."""

    to_first_step: float
    to_exit: float
    cpu: float
    """Of all its processes, on all cores."""


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--only", type=Names(STARTED_BY), default=",".join(STARTED_BY))
@click.option("--workers", type=click.IntRange(min=0), default=0, help="DataLoader's, per rank.")
def main(ranks: list[int], turns: int, only: list[str], workers: int) -> None:
    """Print seconds to the first step, to the end, and of CPU, and their ratio to torchrun's."""
    names = list(dict.fromkeys(["torchrun", *only]))
    for number in ranks:
        found: dict[str, list[Took]] = {name: [] for name in names}
        with tempfile.TemporaryDirectory(prefix="launch-") as folder:
            for turn in range(turns):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    out = Path(folder) / f"{name}-{turn}"
                    found[name].append(start(STARTED_BY[name], number, workers, out))
        title = f"{number} rank{'s' if number > 1 else ''}, medians of {turns}"
        head = (
            "started by",
            "s to the first step",
            "ratio",
            "s to exit",
            "ratio",
            "CPU s",
            "ratio",
        )
        print_table(head, rows(found), title=title)


def rows(found: Mapping[str, Sequence[Took]]) -> list[list[Cell]]:
    """Return the cells of each launcher."""
    table: list[list[Cell]] = []
    for name, turns in found.items():
        row: list[Cell] = [TITLES.get(name, name)]
        for measure in (attrgetter(field) for field in Took._fields):
            own, reference = map(measure, turns), map(measure, found["torchrun"])
            row.append((median(map(measure, turns)), ".2f"))
            row.append((median(map(truediv, own, reference)), ".2f"))
        table.append(row)
    return table


def start(command: Sequence[str], ranks: int, workers: int, out: Path) -> Took:
    """Train once, and return what it took."""
    program, *arguments = (word.format(ranks=ranks) for word in command)
    if program == "accelerate" and ranks > 1:
        arguments.insert(1, "--multi_gpu")  # which means several processes
    moments = out.with_suffix(".txt")
    settings = [f"moments={moments}", f"workers={workers}", "device=cpu", "--out", str(out)]
    if "frameworks.py" in arguments[-5:]:
        settings.remove("device=cpu")
    threads = max(len(os.sched_getaffinity(0)) // ranks, 1)
    environment = os.environ | {
        "OMP_NUM_THREADS": str(threads),
        "CUDA_VISIBLE_DEVICES": "",
        "ACCELERATE_USE_CPU": "true",
    }
    with (out.with_suffix(".log")).open("w+") as log:
        begun = time.monotonic()
        process = subprocess.Popen(
            [str(BIN / program), *arguments, *settings],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, used = os.wait4(process.pid, 0)
        ended = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise click.ClickException(f"{log.read()}\n{program} on {ranks} failed, see above.")
    stepped = [float(line) for line in moments.read_text().split()]
    if len(stepped) != ranks:
        raise click.ClickException(f"{program}: {ranks} ranks were asked for, {len(stepped)} came.")
    return Took(max(stepped) - begun, ended - begun, used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    main()
