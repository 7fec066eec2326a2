"""Quick checkpoints that nodes promote together; each rank is a thread with a disk of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launcher.engine.training.promotion import promote_newest
from launcher.runs.checkpoints import begin_checkpoint, commit_checkpoint, list_checkpoints
from launcher.runs.events import Promoted, read_events
from launcher.runs.job import ResumeFrom
from launcher.runs.manifest import FORMAT, Manifest, sum_file
from launcher.runs.quick_checkpoints import commit_part, folder_of_run, make_private, write_attempt
from launcher.runs.rundir import RunDir

ATTEMPT, STALE = "0123456789abcdef", "fedcba9876543210"
FILES = tuple(f"shard-0000{rank}-model-00001-of-00001.safetensors" for rank in (1, 2, 3, 4))

EMPTY = Manifest(
    format=FORMAT,
    step=5,
    samples=0,
    world_size=4,
    agreement={},
    values={"optimizer": {}, "groups": [], "scaler": None},
    versions={},
)


class Exchange:
    """What the ranks of one run exchange."""

    def __init__(self, size: int) -> None:
        self.barrier, self.values = threading.Barrier(size, timeout=20), [None] * size


@dataclass
class Rank:
    """One rank, as far as a promotion needs it."""

    exchange: Exchange
    rank: int
    plan: Any

    def gather(self, value: Any) -> list[Any]:
        """Return the values of all ranks."""
        self.exchange.values[self.rank] = value
        self.exchange.barrier.wait()
        values = list(self.exchange.values)
        self.exchange.barrier.wait()
        return values

    def broadcast(self, value: Any) -> Any:
        """Return the value of rank 0."""
        return self.gather(value)[0]


class Nodes:
    """Two nodes of two ranks, whose run has a checkpoint after step 5 and a quick one after 8.

    The part of each rank is on its own node and on the other one.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.run_dir = folder, RunDir(folder / "out")
        self.run_dir.path.mkdir()
        commit_checkpoint(begin_checkpoint(self.run_dir, 5), EMPTY)
        write_attempt(self.run_dir, ATTEMPT)
        self.add(8)

    def base(self, node: int) -> str:
        """Return the folder of a node."""
        return str(self.folder / f"node{node}")

    def add(self, step: int, attempt: str = ATTEMPT) -> None:
        """Add a quick checkpoint."""
        parts = []
        for rank in range(4):
            base = self.base(rank // 2)
            folder = folder_of_run(base, self.run_dir) / attempt / f"rank{rank}"
            make_private(base, folder)
            parts.append(folder / f".step-{step:08}")
            parts[-1].mkdir()
            for name in (FILES[rank], FILES[(rank + 2) % 4]):
                (parts[-1] / name).write_bytes(f"{name} {step}".encode())
        sums = {name: sum_file(parts[rank] / name) for rank, name in enumerate(FILES)}
        for part in parts:
            commit_part(part, replace(EMPTY, step=step, files=sums))

    def copies(self, number: int, step: int = 8) -> list[Path]:
        """Return the copies of the file of a rank, that of node 0 first."""
        return sorted(self.folder.glob(f"node*/*/*/*/step-{step:08}/{FILES[number]}"))

    def promote(
        self, start: ResumeFrom | None = None, nodes: tuple[int, ...] = (0, 1)
    ) -> tuple[ResumeFrom, list[str]]:
        """Let the ranks of nodes promote; return where they resume, and what rank 0 has told."""
        exchange, told = Exchange(2 * len(nodes)), list[str]()

        def take_part(rank: int) -> ResumeFrom:
            backend: Any = Rank(exchange, rank, SimpleNamespace(nproc_per_node=2))
            tell: Callable[[str], None] = told.append if rank == 0 else lambda _: None
            base = self.base(nodes[rank // 2])
            return promote_newest(start or ResumeFrom(), base, backend, self.run_dir, tell)

        with ThreadPoolExecutor(len(exchange.values)) as pool:
            found = list(pool.map(take_part, range(len(exchange.values))))
        assert all(each == found[0] for each in found)
        return found[0], told

    def check(self, *steps: int) -> None:
        """Fail unless the run has undamaged checkpoints of these steps."""
        found = list_checkpoints(self.run_dir)
        assert [each.step for each in found] == list(steps)
        for each in found:
            manifest = each.read_manifest()
            assert not list(each.find_damage(manifest.files, manifest))
            assert not list(each.find_unlisted(manifest)) or each.step == 5
        promoted = [each.step for each in read_events(self.run_dir) if isinstance(each, Promoted)]
        assert promoted == list(steps[:-1])
        assert not list(self.run_dir.checkpoints.glob(".*"))


@pytest.fixture
def nodes(tmp_path: Path) -> Nodes:
    """Return two nodes with a quick checkpoint."""
    return Nodes(tmp_path)


@pytest.mark.parametrize("left", [(0, 1), (0,), (1,)])
def test_the_nodes_that_are_left_promote(nodes: Nodes, left: tuple[int, ...]) -> None:
    """All nodes, and each one alone, have every file of the quick checkpoint."""
    start, told = nodes.promote(ResumeFrom(step=5, accept=("data",)), left)
    assert start == ResumeFrom(step=8, accept=("data",))
    assert len(told) == 1
    nodes.check(8, 5)


def test_a_damaged_file_is_taken_from_the_other_node(nodes: Nodes) -> None:
    """Whichever of its two copies is damaged, a file is taken from the other."""
    for number, damaged in enumerate((0, 1, 0, 1)):
        path = nodes.copies(number)[damaged]
        path.write_bytes(path.read_bytes().swapcase())
    assert nodes.promote()[0] == ResumeFrom()
    nodes.check(8, 5)


@pytest.mark.parametrize("left", [b"", b"x" * 48])
def test_a_file_that_is_lost_twice_is_told_of(nodes: Nodes, left: bytes) -> None:
    """Without an undamaged copy of a file nothing is promoted, and one line names the file."""
    size = len(nodes.copies(1)[0].read_bytes())
    for path in nodes.copies(1):
        path.write_bytes(left[:size])
    start, told = nodes.promote(ResumeFrom(step=5))
    assert start == ResumeFrom(step=5)
    assert len(told) == 1
    assert FILES[1] in told[0]
    assert "step-00000005" in told[0]
    nodes.check(5)


def test_the_quick_checkpoint_before_is_taken_instead(nodes: Nodes) -> None:
    """If the newest quick checkpoint is lost, the one before it is promoted."""
    nodes.add(11)
    for path in nodes.copies(0, step=11):
        path.unlink()
    nodes.promote()
    nodes.check(8, 5)


def test_only_newer_ones_of_the_last_attempt_are_promoted(nodes: Nodes) -> None:
    """Nothing is promoted of another attempt, of a step that the run has, or past --from."""
    nodes.add(14, attempt=STALE)
    assert nodes.promote(ResumeFrom(step=5, promotes=False)) == (
        ResumeFrom(step=5, promotes=False),
        [],
    )
    nodes.check(5)
    nodes.promote()
    nodes.check(8, 5)
    assert nodes.promote() == (ResumeFrom(), [])
    nodes.check(8, 5)


def test_a_full_run_folder_promotes_nothing(nodes: Nodes) -> None:
    """If files cannot be copied to the run folder, its checkpoint is used, and one line says so."""
    nodes.run_dir.checkpoints.rename(nodes.folder / "elsewhere")
    nodes.run_dir.checkpoints.symlink_to(nodes.folder / "elsewhere")
    start, told = nodes.promote()
    assert start == ResumeFrom()
    assert len(told) == 1
    assert "symbolic link" in told[0]
