"""Measure what a checkpoint costs the training: the stall of a step, and slower steps afterwards.

    python benchmarks/checkpoint_cost.py
    python benchmarks/checkpoint_cost.py --baseline ../launcher-before

Claim: steps take at most 1.05 of their time while a checkpoint is written, where a core is free for
the process that writes. One rank with one thread trains nets of several sizes. The process is
compared with the thread that writes where no process can be started, and with the tree of another
version of launcher.

"Quick" are quick checkpoints on a disk of the node, and "sent" are those that two nodes on this
machine also send to each other, each of them half of the state.

    stall     time for which the step before the checkpoint is followed by none: for the first
              checkpoint, whose memory is new, and the median of the others
    writing   time until files are on the disk, and bytes per second
    slowdown  of the steps while a checkpoint is written: the time of writing over what was left of
              it for the steps, w / (w - sum of (step - median step without writing)); the median
    memory    the most that the rank has used
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import click
from contest import HERE, Cell, Numbers, benchmark, print_table

COLUMNS = (
    *("state MB", "written by", "step ms", "first stall ms", "stall ms", "writing s", "MB/s"),
    *("slowdown", "memory MB"),
)


@benchmark
@click.option("--sizes", type=Numbers(int, 1), default="100,300,1000,2000", show_default=True)
@click.option("--saves", type=click.IntRange(min=2), default=4, show_default=True)
@click.option("--every", type=click.IntRange(min=4), default=12, show_default=True)
@click.option("--baseline", type=click.Path(exists=True, file_okay=False, path_type=Path))
def main(sizes: list[int], saves: int, every: int, baseline: Path | None) -> None:
    """Print a row for each size of the state, in megabytes, and each way to write it."""
    folder = Path(tempfile.mkdtemp(prefix="checkpoint_cost-"))
    try:
        print_table(
            COLUMNS,
            rows(sizes, saves, every, baseline, folder),
            title=f"one rank with one thread, {saves} checkpoints {every} steps apart",
        )
    finally:
        shutil.rmtree(folder)


def rows(
    sizes: list[int], saves: int, every: int, baseline: Path | None, folder: Path
) -> Iterator[list[Cell]]:
    """Train with each size in each way, and yield its row."""
    trees = dict.fromkeys(("process", "thread", "quick", "sent"), HERE.parent)
    if baseline is not None:
        trees["baseline"] = baseline
    for size in sizes:
        for name, tree in trees.items():
            settings = [f"state_mb={size}", f"saves={saves}", f"every={every}"]
            settings += ["writer=thread"] if name == "thread" else []
            if name in ("quick", "sent"):
                settings += [f"quick_checkpoints={folder}/quick", f"quick_checkpoint_every={every}"]
                settings.append("checkpoint_every=1000000")
            run(tree, settings, folder / "run", nodes=2 if name == "sent" else 1)
            yield [str(size), name, *read(folder / "run").cells()]
            shutil.rmtree(folder / "run")


def run(tree: Path, settings: list[str], out: Path, nodes: int = 1) -> None:
    """Train the recipe with the launcher of a tree, on as many nodes on this machine.

    Raises:
        click.ClickException: The run failed.
    """
    words = [sys.executable, "-m", "launcher", "run", f"{HERE / 'heavy_state.py'}:heavy_state"]
    words += [*settings, "-n", "1", "--out", str(out)]
    paths = {"PYTHONPATH": str(tree.resolve()), "OMP_NUM_THREADS": "1"}
    environment = os.environ | paths | {"CUDA_VISIBLE_DEVICES": ""}
    if nodes > 1:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        words += ["--nodes", str(nodes), "--rendezvous", f"localhost:{port}"]
    pipe: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    started = [subprocess.Popen(words, env=environment, cwd=HERE, **pipe) for _ in range(nodes)]
    outputs = [each.communicate()[0] for each in started]
    if any(each.returncode for each in started):
        raise click.ClickException("".join(outputs))


@dataclass(frozen=True)
class Costs:
    """What the checkpoints of a run have cost; times in seconds."""

    step: float
    stalls: list[float]
    writing: float
    num_bytes: int
    slowdown: float
    memory: int

    def cells(self) -> list[Cell]:
        """Return the cells of a row."""
        return [
            (1e3 * self.step, ".0f"),
            (1e3 * self.stalls[0], ".0f"),
            (1e3 * median(self.stalls[1:]), ".0f"),
            (self.writing, ".2f"),
            (self.num_bytes / self.writing / 1e6, ".0f"),
            (self.slowdown, ".2f"),
            (self.memory / 1e6, ".0f"),
        ]


def read(folder: Path) -> Costs:
    """Return the costs of the checkpoints of a run, without that at the end of the run."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    steps = json.loads((folder / "times.json").read_text())
    stalls = {
        line["step"]: line["checkpoint_stall_seconds"]
        for line in lines
        if "checkpoint_stall_seconds" in line
    }
    del stalls[len(steps)]
    # Versions before the process tell how long it took until a step noticed the end of the writing.
    writing = {
        line["step"]: line.get("checkpoint_write_seconds", line["checkpoint_seconds"])
        for line in lines
        if "checkpoint_seconds" in line
    }
    quick = quick_saves(folder)
    if quick:
        stalls = {step: stall for step, stall in stalls.items() if step in quick}
        writing = {step: row["write_seconds"] for step, row in quick.items()}
    durations = [ended - began for began, ended in steps]
    is_free = [
        all(not start < began < start + duration for start, duration in spans(steps, writing))
        for began, _ in steps
    ]
    free = [seconds for seconds, free in zip(durations[2:], is_free[2:], strict=True) if free]
    step = median(free or durations[2:])
    slowdowns = []
    for saved in stalls:
        duration, lost = writing[saved], 0.0
        start = steps[saved][0]
        for (began, _), seconds in zip(steps[saved:], durations[saved:], strict=True):
            if began < start + duration:
                lost += seconds - step
        slowdowns.append(duration / max(duration - lost, 1e-9))
    (folder_bytes,) = (
        sum(path.stat().st_size for path in each.iterdir())
        for each in (folder / "checkpoints").iterdir()
    )
    return Costs(
        step=step,
        stalls=list(stalls.values()),
        writing=median(writing[saved] for saved in stalls),
        num_bytes=folder_bytes,
        slowdown=median(slowdowns),
        memory=max(max(line["ranks"]["memory_bytes"]) for line in lines if "ranks" in line),
    )


def quick_saves(folder: Path) -> dict[int, dict[str, Any]]:
    """Return the events of the quick checkpoints of a run, by their steps."""
    rows = map(json.loads, (folder / "events.jsonl").read_text().splitlines())
    return {row["step"]: row for row in rows if row.get("place") == "quick"}


def spans(steps: list[list[float]], writing: dict[int, float]) -> Iterator[tuple[float, float]]:
    """Yield when each checkpoint began to be written, and for how long it was."""
    for saved, seconds in writing.items():
        if saved < len(steps):
            yield steps[saved][0], seconds


if __name__ == "__main__":
    main()
