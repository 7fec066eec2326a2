"""Settings of DataLoader workers: none of them changes a step, and no worker outlives its rank."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
from support import ROOT, Commands, read_lines

RECIPE = """
from launcher import Data, Recipe, constant, main


def read(*, kind: str = "plain") -> Recipe:
    return Recipe(
        name="read", model=build_model, data=lambda: Data(train=Samples(kind)), loss=loss,
        forward=lambda model, batch: model(batch[0]), batch_size=16, lr=0.1, lr_rule="none",
        steps=6, schedule=constant(), train_samples=40, device="cpu", record_samples=True,
        virtual_ranks=2, exact=True,
    )


def build_model():
    from torch import nn

    return nn.Linear(8, 3)


class Samples:
    def __init__(self, kind):
        self.kind = kind

    def __len__(self):
        return 40

    def __getitem__(self, index):
        import time

        import torch

        time.sleep(0.001)
        x = torch.full((8,), index / 40).sin()
        # The trial and the first steps read some of these.
        return (x + torch.rand(8) if self.kind == "draws" and index % 4 == 1 else x), index % 3


def loss(outputs, batch):
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


if __name__ == "__main__":
    main(read)
"""

SETTINGS = {
    "alone": (1, "num_workers=0"),
    "threads": (1, "num_workers=0 worker_threads=4"),
    "both": (2, "num_workers=1 worker_threads=3 worker_start=forkserver prefetch_factor=4"),
}


def test_no_setting_of_workers_changes_a_step(run: Commands) -> None:
    """Threads, forkserver and depth give each step its samples and its loss, equal to the bit."""
    (run.folder / "recipe.py").write_text(RECIPE)
    losses, samples = {}, {}
    for name, (ranks, settings) in SETTINGS.items():
        done = run(
            *("launcher", "run", "recipe.py:read", "-n", str(ranks), "--out", name),
            *settings.split(),
        )
        assert done.exit_code == 0, done.stderr
        rows = read_lines(run.folder / name / "metrics.jsonl")
        losses[name] = [row["loss"] for row in rows if "loss" in row]
        files = [run.folder / name / f"samples/rank{rank}.jsonl" for rank in range(ranks)]
        steps = zip(*(read_lines(file) for file in files), strict=True)
        samples[name] = [
            [index for row in step for batch in row["micro_batches"] for index in batch]
            for step in steps
        ]
    assert len(losses["alone"]) == 6
    assert losses["threads"] == losses["both"] == losses["alone"]
    assert samples["threads"] == samples["both"] == samples["alone"]


def test_threads_are_refused_for_samples_that_draw(run: Commands) -> None:
    """A run with worker_threads whose samples draw random numbers ends with the reason."""
    (run.folder / "recipe.py").write_text(RECIPE)
    done = run(
        *("launcher", "run", "recipe.py:read", "-n", "1", "--out", "out"),
        *("num_workers=0", "worker_threads=2", "kind=draws"),
    )
    assert done.exit_code == 2, done.stdout
    assert "worker_threads=2" in done.stderr
    assert "random numbers" in done.stderr


_KILLED = """
import sys
import time

from launcher import Data
from launcher.engine.data.prefetching import prefetch
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.ranks.processes import worker_pids
from launcher.runs.job import RecipeSource

if __name__ == "__main__":
    source = RecipeSource(recipe=sys.argv[1])
    recipe = source.build()
    reader = Reader(recipe, recipe.data(), source)
    requests = [MicroBatchRequest("train", 0, [index], has_weight=True) for index in range(40)]
    results = prefetch(reader, requests, workers=2, method="forkserver")
    next(results)
    print(*worker_pids(), flush=True)
    time.sleep(60)
"""


def test_workers_of_a_server_end_with_their_rank(run: Commands) -> None:
    """With worker_start=forkserver, a rank that is killed leaves no worker behind."""
    (run.folder / "recipe.py").write_text(RECIPE)
    (run.folder / "killed.py").write_text(_KILLED)
    command = [sys.executable, "killed.py", f"{run.folder}/recipe.py:read"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, cwd=run.folder, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        workers = [int(pid) for pid in process.stdout.readline().split()]
        assert len(workers) == 2
        server = psutil.Process(workers[0]).ppid()
        assert server != process.pid
        process.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 20
    while left := [pid for pid in (*workers, server) if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    """Return whether a process exists and is no zombie."""
    try:
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False
