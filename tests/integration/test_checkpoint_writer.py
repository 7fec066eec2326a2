"""The processes that write checkpoints beside the ranks of a run."""

from __future__ import annotations

import json
from pathlib import Path

from support import Commands

from launcher.report.run_page import run_page
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.events import Saved
from launcher.runs.history import History
from launcher.runs.rundir import RunDir

RECIPE = """
import os
import signal
from dataclasses import replace

import psutil

from launcher import Recipe
from launcher.recipes.digits import digits

class Killer:
    def after_step(self, context):
        writers = [
            child for child in psutil.Process().children()
            if child.status() != psutil.STATUS_ZOMBIE and "shard_files" in str(child.cmdline())
        ]
        with open(f"writers{context.rank}.txt", "a") as file:
            file.write(f"{context.step} {' '.join(str(child.pid) for child in writers)}\\n")
        if context.rank == 1 and context.step == 3:
            for child in writers:
                child.kill()

def killing() -> Recipe:
    return replace(
        digits(), name="killing", device="cpu", num_workers=0, callbacks=(Killer(),), steps=7,
        epochs=None, checkpoint_every=2, keep_checkpoints=9
    )
"""


def pids(run: Commands, rank: int) -> dict[int, list[str]]:
    """Return the processes beside a rank that write checkpoints, after each step."""
    lines = (run.folder / f"writers{rank}.txt").read_text().splitlines()
    return {int(step): found for step, *found in map(str.split, lines)}


def test_a_run_survives_the_end_of_its_writers(run: Commands) -> None:
    """The killed writer of a rank costs neither a checkpoint nor a step, and is told of once."""
    (run.folder / "recipe.py").write_text(RECIPE)
    done = run("launcher", "run", "recipe.py:killing", "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("rank 1 wrote a checkpoint in a thread") == 1
    assert "rank 0 wrote" not in done.stdout
    assert "SIGKILL" in done.stdout
    run_dir = RunDir(run.folder / "out")
    checkpoints = list_checkpoints(run_dir)
    assert [checkpoint.step for checkpoint in checkpoints] == [7, 6, 4, 2]
    for checkpoint in checkpoints:
        manifest = checkpoint.read_manifest()
        assert not list(checkpoint.find_damage(manifest.files, manifest))
        assert not list(checkpoint.find_unlisted(manifest))
    before, after = pids(run, 1)[3], pids(run, 1)[7]
    assert len(before) == len(after) == 1
    assert before != after
    assert pids(run, 0)[3] == pids(run, 0)[7]
    assert not any(Path(f"/proc/{pid}").exists() for pid in before + after + pids(run, 0)[7])
    check_costs(run_dir)


def check_costs(run_dir: RunDir) -> None:
    """Check the sizes and times of the checkpoints of a run, in events.jsonl and in its report."""
    history = History(run_dir)
    saved = history.checkpoints
    assert [each.step for each in saved] == [2, 4, 6, 7]
    for each in saved:
        folder = run_dir.checkpoints / f"step-{each.step:08}"
        assert each.num_bytes == sum(path.stat().st_size for path in folder.glob("shard-*"))
        assert 0 < each.write_seconds <= each.seconds
        assert each.stall_seconds > 0
    lines = [json.loads(line) for line in run_dir.metrics.read_text().splitlines()]
    found = [line["checkpoint_bytes"] for line in lines if "checkpoint_bytes" in line]
    assert found == [each.num_bytes for each in saved]
    (section,) = (each for each in run_page(history).sections if each.title == "Checkpoints")
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == ["2", "4", "6", "7"]
    assert len(section.figures) == 2


def test_bandwidth_is_bytes_over_the_time_of_writing() -> None:
    """A checkpoint has the bandwidth of its slowest rank's time, or none if that is unknown."""
    assert Saved(time=1.0, step=1, num_bytes=600, write_seconds=2.0).bytes_per_second == 300
    assert Saved(time=1.0, step=1, num_bytes=600).bytes_per_second is None
