"""Parts of quick checkpoints: how they are sent, listed, verified and removed."""

from __future__ import annotations

import json
import os
import resource
import secrets
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from examples import LAPTOP, recipe

from launcher import RecipeError, make_plan
from launcher.console.explain import explain
from launcher.engine.saving.shard_writer import _WriterProcess
from launcher.planning.timed_steps import Interruptions
from launcher.runs.manifest import FORMAT, Manifest, sum_file
from launcher.runs.part_exchange import target
from launcher.runs.quick_checkpoints import (
    commit_part,
    copy_verified,
    folder_of_run,
    held_steps,
    make_private,
    read_attempt,
    remove_parts,
    write_attempt,
)
from launcher.runs.rundir import RunDir
from launcher.runs.shard_files import encode_request

SHARD = "shard-00001-model-00001-of-00001.safetensors"
CONTENT = bytes(range(256)) * 8191
"""More than one block, and no whole number of blocks."""


class Pair:
    """The processes of two ranks, of which the second receives what the first writes."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self.own, self.other = folder / "own", folder / "other"
        self.own.mkdir()
        self.other.mkdir()
        self.token = secrets.token_hex(32)
        self.sender, self.receiver = _WriterProcess(), _WriterProcess()
        stack.callback(self.sender.close)
        stack.callback(self.receiver.close)
        self.memory = os.memfd_create("checkpoint")
        stack.callback(os.close, self.memory)
        os.pwrite(self.memory, CONTENT, 0)
        self.port = self.receiver.listen("127.0.0.1", self.token, self.other)

    def send(self, step: int, name: str = SHARD, token: str = "") -> dict[str, Any]:
        """Write a file and send it; return the answer."""
        to = target("127.0.0.1", self.port, token or self.token, step)
        files = {name: [(0, 1000), (1000, len(CONTENT) - 1000)]}
        request = encode_request(files, "rank0.json", to)
        os.pwrite(self.memory, request, len(CONTENT))
        folder = os.open(self.own, os.O_RDONLY)
        self.sender.request(self.memory, folder, (len(CONTENT), len(request)))
        os.close(folder)
        answer = self.sender.answer(waits=True)
        assert answer is not None
        return answer

    def received(self, step: int) -> bytes:
        """Return what the receiver has of a file."""
        return (self.other / f".step-{step:08}" / SHARD).read_bytes()


@pytest.fixture
def pair(tmp_path: Path) -> Iterator[Pair]:
    """Give two processes, which end with the test."""
    with ExitStack() as stack:
        yield Pair(tmp_path, stack)


def test_a_part_arrives_as_it_was_written(pair: Pair) -> None:
    """The other node has the bytes of the file, in each checkpoint over one connection."""
    for step in (3, 6):
        assert pair.send(step)["num_bytes"] == len(CONTENT)
        assert pair.received(step) == CONTENT
    sums = json.loads((pair.own / "rank0.json").read_text())
    assert sums[SHARD]["sha256"] == sum_file(pair.own / SHARD).sha256


def test_nothing_is_taken_from_a_stranger(pair: Pair) -> None:
    """Without the token, or under the name of another file, nothing is written."""
    assert "error" in pair.send(3, token="0" * 64)
    assert "error" in pair.send(3, name="checkpoint.json")
    assert list(pair.other.iterdir()) == []
    assert "error" not in pair.send(6)


def test_a_full_disk_of_the_other_node_is_an_error(pair: Pair) -> None:
    """A part that finds no room there is not written; the next one has its chance."""
    pid = pair.receiver.pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    assert "File too large" in pair.send(3)["error"]
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert "error" not in pair.send(6)
    assert pair.received(6) == CONTENT


def test_a_lost_neighbour_is_an_error_and_another_is_found(pair: Pair) -> None:
    """A part whose receiver has ended is not written; its successor receives the next one."""
    assert "error" not in pair.send(3)
    pair.receiver.close()
    assert "127.0.0.1: " in pair.send(6)["error"]
    pair.receiver = _WriterProcess()
    pair.port = pair.receiver.listen("127.0.0.1", pair.token, pair.other)
    assert "error" not in pair.send(9)
    pair.receiver.close()
    assert pair.received(9) == CONTENT


def manifest(step: int, **files: Path) -> Manifest:
    """Return the manifest of a checkpoint with files."""
    return Manifest(
        format=FORMAT,
        step=step,
        samples=0,
        world_size=2,
        agreement={},
        values={"optimizer": {}, "groups": [], "scaler": None},
        versions={},
        files={f"{name}.safetensors": sum_file(path) for name, path in files.items()},
    )


@pytest.fixture
def attempt(tmp_path: Path) -> Path:
    """Return the folder of an attempt with one part of step 8."""
    folder = tmp_path / "base/run/attempt"
    make_private(str(tmp_path / "base"), folder / "rank0")
    part = folder / "rank0/.step-00000008"
    part.mkdir()
    for name in "ab":
        (part / f"{name}.safetensors").write_bytes(name.encode())
    paths = {name: part / f"{name}.safetensors" for name in "ab"}
    commit_part(part, manifest(8, **paths))
    return folder


def test_a_node_lists_what_it_has(attempt: Path) -> None:
    """Files that are missing or have another size are not listed, nor are older checkpoints."""
    (held,) = held_steps(attempt, 7).values()
    assert sorted(held.folders) == ["a.safetensors", "b.safetensors"]
    assert held_steps(attempt, 8) == {}
    (attempt / "rank0/step-00000008/b.safetensors").write_bytes(b"longer")
    (held,) = held_steps(attempt, 7).values()
    assert sorted(held.folders) == ["a.safetensors"]


def make_incomplete(part: Path) -> None:
    """Let a part look as it does while it is written."""
    part.rename(part.with_name(f".{part.name}"))


def damage_manifest(part: Path) -> None:
    """Change the manifest of a part."""
    path = part / "checkpoint.json"
    path.write_text(path.read_text().replace('"samples": 0', '"samples": 1'))


def open_to_all(part: Path) -> None:
    """Let every user write to the folder of the attempt."""
    part.parents[1].chmod(0o777)


@pytest.mark.parametrize("change", [make_incomplete, damage_manifest, open_to_all])
def test_what_is_not_trustworthy_is_not_listed(
    attempt: Path, change: Callable[[Path], object]
) -> None:
    """Parts that are incomplete, damaged, or where others can write do not count."""
    change(attempt / "rank0/step-00000008")
    assert held_steps(attempt, 0) == {}


def test_a_folder_of_another_user_is_not_used(tmp_path: Path) -> None:
    """A folder that other users can write to takes no quick checkpoints."""
    folder = tmp_path / "base/run"
    folder.mkdir(parents=True)
    folder.chmod(0o777)
    with pytest.raises(OSError, match="another user"):
        make_private(str(tmp_path / "base"), folder / "attempt")


def test_copies_are_verified(attempt: Path, tmp_path: Path) -> None:
    """A copy is made of an undamaged file alone."""
    path = attempt / "rank0/step-00000008/a.safetensors"
    expected = sum_file(path)
    assert copy_verified(path, tmp_path, expected) is None
    assert (tmp_path / "a.safetensors").read_bytes() == b"a"
    path.write_bytes(b"x")
    assert "SHA-256" in str(copy_verified(path, tmp_path, expected))
    path.unlink()
    assert "No such file" in str(copy_verified(path, tmp_path, expected))


def test_older_parts_are_removed(attempt: Path) -> None:
    """Parts of earlier steps are removed, complete or not, and later ones stay."""
    rank = attempt / "rank0"
    (rank / ".step-00000004").mkdir()
    (rank / ".step-00000012").mkdir()
    remove_parts(rank, 8)
    assert sorted(path.name for path in rank.iterdir()) == [".step-00000012", "step-00000008"]
    remove_parts(rank, 9)
    assert [path.name for path in rank.iterdir()] == [".step-00000012"]


def test_an_attempt_is_known_by_the_run_folder(tmp_path: Path) -> None:
    """Another run folder, of the same name too, has other quick checkpoints; damage means none."""
    runs = [RunDir(tmp_path / name / "run") for name in ("one", "two")]
    assert folder_of_run("/quick", runs[0]) != folder_of_run("/quick", runs[1])
    runs[0].path.mkdir(parents=True)
    assert read_attempt(runs[0]) is None
    write_attempt(runs[0], "0123456789abcdef")
    assert read_attempt(runs[0]) == "0123456789abcdef"
    write_attempt(runs[0], "../../elsewhere")
    assert read_attempt(runs[0]) is None


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quick_checkpoints": "/quick"}, "quick_checkpoint_every"),
        ({"quick_checkpoint_every": 5}, "quick_checkpoints"),
        ({"quick_checkpoints": "quick", "quick_checkpoint_every": 5}, "relative"),
        ({"quick_checkpoints": "/quick", "quick_checkpoint_every": 0}, "at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings: dict[str, Any], named: str) -> None:
    """Half of the settings, a relative folder and an interval of no steps are refused."""
    with pytest.raises(RecipeError, match=named):
        replace(recipe(), **settings)


@pytest.mark.parametrize(("nodes", "room"), [(1, "2 x"), (2, "2 x"), (4, "1 x"), (16, "0.25 x")])
def test_a_plan_tells_the_room_on_each_node(nodes: int, room: str) -> None:
    """Two checkpoints are kept, of which several nodes have each part twice."""
    settings = {"quick_checkpoints": "/dev/shm/quick", "quick_checkpoint_every": 5}
    plan = make_plan(recipe(**settings), LAPTOP, nodes=nodes, nproc_per_node=1)
    assert f" up to {room} " in plan.derivations["quick_checkpoints"]
    assert f" up to {room} " in " ".join(explain(plan).split())
    without = make_plan(recipe(), LAPTOP, nodes=nodes, nproc_per_node=1)
    assert "quick" not in explain(without)


def test_max_time_counts_the_delays_of_quick_checkpoints() -> None:
    """A run with max_time expects as many delays as it saves checkpoints of either kind."""
    both = Interruptions(save_every_seconds=60, quick_every_steps=10)
    assert both.checkpoints(5, 50, 180) == 3 + 4
    assert (
        replace(both, save_every_steps=20, save_every_seconds=None).checkpoints(5, 50, 9) == 2 + 4
    )
