"""Time the launch to the first optimizer step and to exit, for launcher and other launchers.

    python benchmarks/launch.py

Claim: `launcher run` reaches the first step sooner than torchrun, accelerate launch and deepspeed,
and uses less CPU time. Each launcher starts the same recipe file, first_step.py, which takes five
steps on a small net. `launcher run --warm` forks its runs from a server that is started before the
first turn, and its CPU time is that of its client alone. torchrun also starts a plain PyTorch loop
over the same data, without launcher's engine. The launchers take turns, each turn in another order;
a ratio is the median of the ratios within each turn.
"""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
    "warm": ("launcher", "run", RECIPE, "-n", "{ranks}", "--warm"),
    "plain": ("torchrun", "--standalone", "--nproc-per-node", "{ranks}", *PLAIN),
    "accelerate": (*_ACCELERATE, RECIPE),
    "deepspeed": ("deepspeed", "--num_accelerators", "{ranks}", RECIPE),
}
TITLES = {
    "launcher": "launcher run",
    "warm": "launcher run --warm",
    "plain": "torchrun, plain PyTorch loop",
    "accelerate": "accelerate launch",
}
"""Names in the table that differ from the keys of STARTED_BY."""

HEAD = ("started by", "s to the first step", "ratio", "s to exit", "ratio", "CPU s", "ratio")


class LaunchTimes(NamedTuple):
    """Durations of one run in seconds."""

    to_first_step: float
    """From the launch to the end of the first step on the slowest rank."""

    to_exit: float
    """From the launch to the exit of the launcher."""

    cpu: float
    """CPU time of all processes."""


@benchmark
@click.option("--ranks", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--turns", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--only", type=Names(STARTED_BY), default=",".join(STARTED_BY))
@click.option(
    "--workers", type=click.IntRange(min=0), default=0, help="DataLoader workers per rank."
)
def main(ranks: list[int], turns: int, only: list[str], workers: int) -> None:
    """Print seconds to the first step, to exit and of CPU time, and their ratios to torchrun's."""
    names = list(dict.fromkeys(["torchrun", *only]))
    for num_ranks in ranks:
        times: dict[str, list[LaunchTimes]] = {name: [] for name in names}
        with ExitStack() as stack:
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="launch-"))
            if "warm" in names:
                stack.enter_context(warm_server(num_ranks, workers, Path(folder)))
            for turn in range(turns):
                first = turn % len(names)
                for name in names[first:] + names[:first]:
                    out = Path(folder) / f"{name}-{turn}"
                    times[name].append(time_launch(STARTED_BY[name], num_ranks, workers, out))
        title = f"{num_ranks} rank{'s' if num_ranks > 1 else ''}, medians of {turns}"
        print_table(HEAD, table_rows(times), title=title)


@contextmanager
def warm_server(ranks: int, workers: int, folder: Path) -> Iterator[None]:
    """Start a warm server with its socket in a folder, and end it afterwards."""
    before = os.environ.get("XDG_RUNTIME_DIR")
    os.environ["XDG_RUNTIME_DIR"] = str(folder)
    try:
        time_launch(STARTED_BY["warm"], ranks, workers, folder / "server")
        yield
        subprocess.run([str(BIN / "launcher"), "warm", "stop"], check=True, capture_output=True)
    finally:
        if before is None:
            del os.environ["XDG_RUNTIME_DIR"]
        else:
            os.environ["XDG_RUNTIME_DIR"] = before


def table_rows(times: Mapping[str, Sequence[LaunchTimes]]) -> list[list[Cell]]:
    """Return a row of cells for each launcher."""
    table: list[list[Cell]] = []
    for name, turns in times.items():
        row: list[Cell] = [TITLES.get(name, name)]
        for get_seconds in (attrgetter(field) for field in LaunchTimes._fields):
            seconds = list(map(get_seconds, turns))
            reference = map(get_seconds, times["torchrun"])
            row.append((median(seconds), ".2f"))
            row.append((median(map(truediv, seconds, reference)), ".2f"))
        table.append(row)
    return table


def time_launch(command: Sequence[str], ranks: int, workers: int, out: Path) -> LaunchTimes:
    """Train once and return how long it took.

    Raises:
        click.ClickException: The run failed, or a rank did not record its first step.
    """
    program, *arguments = (word.format(ranks=ranks) for word in command)
    if program == "accelerate" and ranks > 1:
        arguments.insert(1, "--multi_gpu")  # the option means several processes, on CPU too
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
        started = time.monotonic()
        process = subprocess.Popen(
            [str(BIN / program), *arguments, *settings],
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        _, status, usage = os.wait4(process.pid, 0)
        ended = time.monotonic()
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise click.ClickException(f"{log.read()}\n{program} on {ranks} failed, see above.")
    first_steps = [float(line) for line in moments.read_text().split()]
    if len(first_steps) != ranks:
        raise click.ClickException(
            f"{program}: {ranks} ranks were asked for, and {len(first_steps)} took a step."
        )
    return LaunchTimes(
        to_first_step=max(first_steps) - started,
        to_exit=ended - started,
        cpu=usage.ru_utime + usage.ru_stime,
    )


if __name__ == "__main__":
    main()
