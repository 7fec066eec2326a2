"""Quick checkpoints: saved on the disks of nodes, and promoted after a loss.

A node is a launcher of its own on this machine; a mount namespace gives each a disk of its own.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
from meeting_launchers import Launchers, check_equal, train_undisturbed
from support import ROOT, Commands, Finished, read_lines, read_weights, wait_until

from launcher.report.run_page import run_page
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.history import History
from launcher.runs.rundir import RunDir

HELD = f"{ROOT}/tests/recipes/held.py:held"
KILLING = f"{ROOT}/tests/recipes/held.py:killing"
SEPARATE = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs -o size=8m none "$0" && exec "$@"')

needs_disks = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root, to mount disks"
)


def losses_of(run_dir: RunDir) -> dict[int, float]:
    """Return the loss of each step."""
    return {row["step"]: row["loss"] for row in read_lines(run_dir.metrics) if "loss" in row}


@pytest.fixture(scope="module")
def undisturbed(module_run: Commands) -> RunDir:
    """Return a finished run on two nodes that nothing disturbs, without quick checkpoints."""
    run_dir = train_undisturbed(module_run)
    assert not run_dir.quick.exists()
    return run_dir


def check_same(run_dir: RunDir, undisturbed: RunDir) -> None:
    """Fail unless a run has the losses and the weights of the undisturbed one, to the bit."""
    check_equal(run_dir, read_weights(undisturbed.path))
    assert losses_of(run_dir) == losses_of(undisturbed)


def lose_node(run: Commands, port: int, disturb: Any = lambda *_: None) -> Launchers:
    """Kill one of two nodes with all it has, after a quick checkpoint; a spare takes its place.

    Args:
        run: Runs commands in a folder.
        port: A free port.
        disturb: Called before, with the folder of the rank on the other node as that node sees it,
            and the step of the quick checkpoint.
    """
    disk = run.folder / "disk"
    disk.mkdir()
    quick = (f"quick_checkpoints={disk}/quick", "quick_checkpoint_every=3", "hold=9")
    three = Launchers(
        run,
        port,
        *("--nodes", "2", "--spares", "1", "--max-restarts", "1"),
        *quick,
        recipe=HELD,
        save_every=1000,
        before=(*SEPARATE, str(disk)),
    )
    three.start_in_order(3)
    wait_until((run.folder / "held").exists, *three.processes)
    wait_until((run.folder / "held").read_text, *three.processes)
    step = int((run.folder / "held").read_text())
    seen = Path(f"/proc/{three.launcher_of(0).pid}/root{disk}/quick")
    (rank,) = seen.glob("*/*/rank0")
    disturb(rank, step)
    three.launcher_of(1).kill()
    (run.folder / "go").touch()
    assert sorted(three.finish()) == [-signal.SIGKILL, 0, 0], three.outputs
    return three


@needs_disks
def test_a_lost_node_costs_the_steps_since_the_quick_checkpoint(
    run: Commands, free_port: int, undisturbed: RunDir
) -> None:
    """After a node is lost with its disk, its parts are taken from its neighbour, bit for bit."""
    three = lose_node(run, free_port)
    (promoted,) = three.events("promoted")
    step = int((run.folder / "held").read_text())
    assert step >= 9
    assert promoted["step"] == step
    (recovered,) = three.events("recovered")
    assert recovered["step"] == step + 1
    steps = [each["step"] for each in three.events("saved") if each["place"] == "quick"]
    assert steps.count(step) == 1
    assert max(steps) > step
    check_same(three.run_dir, undisturbed)


def remove_other_part(rank: Path, step: int) -> None:
    """Remove what a node has of the part of the other node's rank."""
    (file,) = (rank / f"step-{step:08}").glob("shard-00002-*")
    file.unlink()


@needs_disks
def test_what_is_lost_twice_costs_the_steps_since_the_checkpoint(
    run: Commands, free_port: int, undisturbed: RunDir
) -> None:
    """Without any copy of a file, the checkpoint in the run folder is used, and one line tells."""
    three = lose_node(run, free_port, remove_other_part)
    assert not three.events("promoted")
    saved = [each["step"] for each in three.events("saved") if each["place"] == "run folder"]
    assert [each["step"] for each in three.events("recovered")] == [saved[0] + 1]
    lines = [line for out, _ in three.outputs for line in out.splitlines()]
    (told,) = (line for line in lines if "shard-00002-" in line)
    assert f"using step-{saved[0]:08}" in told
    check_same(three.run_dir, undisturbed)


def test_a_process_that_ends_costs_one_quick_checkpoint(
    run: Commands, free_port: int, undisturbed: RunDir
) -> None:
    """After the process of a rank is killed, its neighbour finds the next one, and warns once."""
    settings = (f"quick_checkpoints={run.folder}/quick", "quick_checkpoint_every=4")
    both = Launchers(run, free_port, "--nodes", "2", *settings, recipe=KILLING, save_every=1000)
    both.start_in_order(2)
    assert both.finish() == [0, 0], both.outputs
    steps = [each["step"] for each in both.events("saved") if each["place"] == "quick"]
    assert min(steps) <= int((run.folder / "killed").read_text()) < max(steps)
    warnings = [out.count("the quick checkpoint after step") for out, _ in both.outputs]
    assert sum(warnings) == 1, both.outputs
    check_same(both.run_dir, undisturbed)
    assert list((run.folder / "quick").iterdir()) == []


class Interrupted:
    """A run on two ranks of one node that is killed after a quick checkpoint."""

    def __init__(self, run: Commands, *settings: str) -> None:
        self.run, self.run_dir = run, RunDir(run.folder / "out")
        self.disk = run.folder / "quick"
        process = run.start(
            *("launcher", "run", HELD, "-n", "2", "--out", "out", "steps=30", "hold=9"),
            *("checkpoint_every=1000", f"quick_checkpoints={self.disk}"),
            *("quick_checkpoint_every=3", "record_samples=false", *settings),
        )
        wait_until((run.folder / "held").exists, process)
        wait_until((run.folder / "held").read_text, process)
        self.step = int((run.folder / "held").read_text())
        process.kill()
        process.communicate()
        (run.folder / "go").touch()
        (self.saved,) = [each.step for each in list_checkpoints(self.run_dir)]

    def resume(self, *arguments: str) -> Finished:
        """Resume the run."""
        return self.run("launcher", "resume", "out", *arguments)

    def parts(self) -> list[Path]:
        """Return the complete parts on the disk."""
        return sorted(self.disk.glob("*/*/rank*/step-*"))

    def starts(self) -> list[int]:
        """Return the steps after which the attempts have begun."""
        return [each.began.step for each in History(self.run_dir).attempts()]


@pytest.fixture
def interrupted(run: Commands) -> Interrupted:
    """Return a run that was killed after a quick checkpoint."""
    return Interrupted(run)


def test_a_killed_run_resumes_from_its_quick_checkpoint(interrupted: Interrupted) -> None:
    """`launcher resume` goes on from the quick checkpoint, on another number of ranks too."""
    assert interrupted.step > interrupted.saved
    done = interrupted.resume("-n", "1")
    assert done.exit_code == 0, done.stderr
    assert interrupted.starts() == [0, interrupted.step]
    assert done.stdout.count(f"launcher: step-{interrupted.step:08}") == 1
    history = History(interrupted.run_dir)
    quick = [each.step for each in history.quick_checkpoints]
    assert interrupted.step in quick
    (section,) = (each for each in run_page(history).sections if each.title == "Checkpoints")
    assert f" {len(quick)} of them" in section.paragraph
    assert section.table is not None
    assert [row[0] for row in section.table.rows] == [f"{interrupted.saved}", "30"]
    assert list(interrupted.disk.iterdir()) == []
    checkpoints = [each.step for each in list_checkpoints(interrupted.run_dir)]
    assert checkpoints == [30, interrupted.step]


def test_a_damaged_part_costs_the_steps_since_the_checkpoint(interrupted: Interrupted) -> None:
    """A part whose only copy has another byte is not used, and one line names its file."""
    file = next(interrupted.parts()[-1].glob("shard-*"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    done = interrupted.resume("steps=12")
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count(file.name) == 1
    assert interrupted.starts() == [0, interrupted.saved]


def test_a_named_checkpoint_is_not_overtaken(interrupted: Interrupted) -> None:
    """With --from no quick checkpoint is used, and none comes back in a later resumption."""
    name = f"step-{interrupted.saved:08}"
    done = interrupted.resume("--from", name, "quick_checkpoint_every=1000", "steps=12")
    assert done.exit_code == 0, done.stderr
    assert interrupted.parts() == []
    done = interrupted.resume("steps=14")
    assert done.exit_code == 0, done.stderr
    assert interrupted.starts() == [0, interrupted.saved, 12]


def test_a_resumption_without_quick_checkpoints_leaves_none_to_come_back(
    interrupted: Interrupted,
) -> None:
    """After a resumption without the settings, what is left on the disk is never promoted."""
    done = interrupted.resume("quick_checkpoints=none", "quick_checkpoint_every=none", "steps=8")
    assert done.exit_code == 0, done.stderr
    assert interrupted.parts() != []
    again = interrupted.resume(
        f"quick_checkpoints={interrupted.disk}", "quick_checkpoint_every=1000", "steps=12"
    )
    assert again.exit_code == 0, again.stderr
    assert interrupted.starts() == [0, interrupted.saved, 8]
    assert interrupted.parts() == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may mount a small disk")
def test_a_full_disk_of_a_node_is_one_warning(run: Commands) -> None:
    """Quick checkpoints without room are told of once; steps and other checkpoints go on."""
    disk = run.folder / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "none", disk], check=False)
    if mounted.returncode:
        pytest.skip("no disk can be mounted here")
    try:
        done = run(
            *("launcher", "run", f"{ROOT}/tests/recipes/worlds.py:worlds", "-n", "2"),
            *("checkpoint_every=1000", f"quick_checkpoints={disk}", "quick_checkpoint_every=6"),
            *("--out", "out"),
        )
        left = list(disk.iterdir())
    finally:
        subprocess.run(["umount", disk], check=True)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.count("No space left on device") == 1, done.stdout
    checkpoints = [each.step for each in list_checkpoints(RunDir(run.folder / "out"))]
    assert checkpoints == [15, 5]
    assert left == []


def test_a_folder_that_cannot_be_used_is_refused(run: Commands) -> None:
    """A new run whose quick checkpoints have no place is refused before its first step."""
    done = run(
        *("launcher", "run", f"{ROOT}/tests/recipes/worlds.py:worlds", "-n", "1", "--out", "out"),
        *("quick_checkpoints=/dev/null/quick", "quick_checkpoint_every=2"),
    )
    assert done.exit_code == 2
    assert done.stderr.count("/dev/null/quick") == 1
    assert "Traceback" not in done.stderr
    assert not RunDir(run.folder / "out").metrics.exists()
