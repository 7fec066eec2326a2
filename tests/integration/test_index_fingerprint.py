"""Tests of fingerprints of data sets: a changed one is refused when a run resumes."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from launcher import Data, RecipeError, Shards
from launcher.engine.data.fingerprint import first_difference
from launcher.engine.data.index_fingerprint import describe_index
from launcher.errors import CheckpointError
from launcher.runs.job import ResumeFrom


class Own(Dataset[Any]):
    """Samples with a fingerprint of their own."""

    def __init__(self, version: str) -> None:
        self.version = version

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return [torch.ones(4)]

    def fingerprint(self) -> str:
        """Return the version."""
        return self.version


class Folder:
    """Files with classes, as an ImageFolder has them."""

    def __init__(self, root: Path) -> None:
        self.root = str(root)
        self.samples = [(str(path), 0) for path in sorted(root.iterdir())]


class Mapped:
    """Tokens in a memory-mapped file."""

    def __init__(self, path: Path) -> None:
        self.tokens = np.memmap(path, np.uint16, "r")


def differ(one: Any, other: Any) -> bool:
    """Return whether two data sets have different descriptions, as JSON holds them."""
    before, now = (json.loads(json.dumps(describe_index(each))) for each in (one, other))
    assert before is not None
    return first_difference(before, now) is not None


def test_tensors_are_told_apart_by_what_they_hold() -> None:
    """One changed row of many is noticed, in wrappers too, and rounding is not."""
    values = torch.randn(5_000, 4, generator=torch.Generator().manual_seed(0))
    changed = values.clone()
    changed[1234] += 100
    one, other = TensorDataset(values), TensorDataset(changed)
    assert not differ(one, TensorDataset(values * (1 + 1e-7)))
    assert differ(one, other)
    assert differ(ConcatDataset([one, one]), ConcatDataset([one, other]))
    assert differ(Subset(one, range(9)), Subset(one, range(1, 10)))
    assert not differ(Subset(one, range(9)), Subset(one, list(range(9))))


def test_files_are_told_apart_by_names_sizes_and_contents(tmp_path: Path) -> None:
    """Folders and memory-mapped files differ with their files, and a copy elsewhere is equal."""
    for name, first in (("a", 1), ("copy", 1), ("b", 2)):
        (tmp_path / name).mkdir()
        for number in range(3):
            content = np.full(20_000, number + first, np.uint16).tobytes()
            (tmp_path / name / f"{number}.bin").write_bytes(content)
    for kind in (Folder, lambda folder: Mapped(folder / "1.bin")):
        data: Any = kind
        assert not differ(data(tmp_path / "a"), data(tmp_path / "copy"))
        assert differ(data(tmp_path / "a"), data(tmp_path / "b"))
    (tmp_path / "copy/2.bin").rename(tmp_path / "copy/3.bin")
    assert differ(Folder(tmp_path / "a"), Folder(tmp_path / "copy"))


def test_a_hugging_face_data_set_is_told_apart_by_its_rows() -> None:
    """Equal tables are equal, whatever their own fingerprints, and other rows or orders differ."""
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict({"x": list(range(100))})
    again = datasets.Dataset.from_dict({"x": list(range(100))})
    assert not differ(made, again)
    assert differ(made, datasets.Dataset.from_dict({"x": list(range(1, 101))}))
    assert differ(made.shuffle(seed=1), made.shuffle(seed=2))


@pytest.mark.parametrize("kind", ["own", "tensors"])
def test_changed_data_is_refused_on_resume(tmp_path: Path, kind: str) -> None:
    """Data of the same size that has changed is refused with its set, unless it is accepted."""
    last = small_runs.INPUTS[:40].clone()
    last[-1] += 5.0
    pairs = {
        "own": (Own("v1"), Own("v2")),
        "tensors": (TensorDataset(small_runs.INPUTS[:40]), TensorDataset(last)),
    }

    def recipe(data: Any) -> Any:
        return small_runs.recipe(data=lambda: Data(train=data))

    before, now = pairs[kind]
    small_runs.train(tmp_path / "run", recipe(before), stop_at=2)
    with pytest.raises(CheckpointError, match="fingerprint of the training data"):
        small_runs.train(tmp_path / "run", recipe(now), ResumeFrom())
    small_runs.train(tmp_path / "run", recipe(now), ResumeFrom(accept=("data",)), stop_at=4)
    small_runs.train(tmp_path / "run", recipe(now), ResumeFrom())


def test_shards_have_a_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It follows the files; one that is cut off during the run is an error with its name."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name, size in (("a", 10), ("b", 11)):
        (tmp_path / name).mkdir()
        with tarfile.open(tmp_path / name / "0.tar", "w") as archive:
            for number in range(4):
                member = tarfile.TarInfo(f"{number}.x")
                member.size = size
                archive.addfile(member, io.BytesIO(b"a" * size))
    one = Shards([tmp_path / "a/0.tar"])
    assert one.fingerprint() == Shards([tmp_path / "a/0.tar"]).fingerprint()
    assert one.fingerprint() != Shards([tmp_path / "b/0.tar"]).fingerprint()
    assert one.file_of(3) == str(tmp_path / "a/0.tar")
    assert one[0]["x"] == b"a" * 10
    with (tmp_path / "a/0.tar").open("r+b") as file:
        file.truncate(1_500)
    assert one[0]["x"] == b"a" * 10
    with pytest.raises(RecipeError, match=r"a/0\.tar changed during the run"):
        one[2]
