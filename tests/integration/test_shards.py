"""Samples in tar files: each once, in any order, in any world."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path

import numpy as np
import pytest
from support import Commands, read_lines

from launcher import RecipeError, Shards

RECIPE = '''
from pathlib import Path

from launcher import Data, Recipe, Shards, main, sgd


def shards(*, data: Path, kind: str = "shards") -> Recipe:
    """A line through samples in tar files."""
    return Recipe(
        name="shards", model=build_model, data=lambda: build_data(data, kind), loss=squared,
        batch_size=8, lr=0.01, lr_batch_size=8, epochs=2, optimizer=sgd(),
    )


def build_model():
    from torch import nn

    return nn.Linear(4, 1)


def build_data(folder, kind):
    if kind == "stream":
        from torch.utils.data import IterableDataset

        members = {"__len__": lambda self: 8, "__iter__": iter}
        return Data(train=type("Stream", (IterableDataset,), members)())
    return Data(train=Shards(sorted(folder.glob("*.tar")), decode))


def decode(sample):
    import numpy as np

    return np.frombuffer(sample["x"], np.float32).copy(), np.float32(sample["y"])


def squared(outputs, batch):
    return (outputs.squeeze(1) - batch[1]).square().sum(), len(batch[1])
'''


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with three shards of 5, 1 and 14 samples."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    made = tmp_path / "data"
    made.mkdir()
    number = 0
    for shard, count in enumerate((5, 1, 14)):
        with tarfile.open(made / f"{shard}.tar", "w") as archive:
            for _ in range(count):
                values = np.full(4, number, np.float32).tobytes()
                for extension, content in (("x", values), ("y", str(number).encode())):
                    member = tarfile.TarInfo(f"some/{number:03}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                number += 1
    return made


def test_each_sample_is_found(folder: Path, tmp_path: Path) -> None:
    """By its number, in any order, from what was kept as from what was looked up."""
    for _ in range(2):
        shards = Shards(sorted(folder.glob("*.tar")))
        assert len(shards) == 20
        for index in (19, 0, 5, 6, 4, 12):
            sample = shards[index]
            assert sample["__key__"] == f"some/{index:03}"
            assert sample["y"] == str(index).encode()
            assert np.frombuffer(sample["x"], np.float32).tolist() == [index] * 4
        with pytest.raises(IndexError):
            shards[20]
        assert len(list((tmp_path / "cache/launcher/shards").iterdir())) == 3


def test_a_shard_that_was_written_anew_is_looked_up_anew(folder: Path) -> None:
    """What was kept is of the file as it was."""
    assert len(Shards([folder / "1.tar"])) == 1
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    assert len(Shards([folder / "1.tar"])) == 5


def test_a_damaged_index_is_made_anew(folder: Path, tmp_path: Path) -> None:
    """What was kept is no reason to fail, whatever has become of it."""
    assert len(Shards([folder / "0.tar"])) == 5
    (kept,) = (tmp_path / "cache/launcher/shards").iterdir()
    whole = kept.read_bytes()
    for damaged in (whole[:-30], whole[: len(whole) // 2], b"", b"else"):
        kept.write_bytes(damaged)
        assert len(Shards([folder / "0.tar"])) == 5
        assert kept.read_bytes() != damaged


def test_what_cannot_be_read_from_anywhere_is_refused(folder: Path) -> None:
    """With the file, and what to do."""
    with pytest.raises(RecipeError, match="Shards of no files"):
        Shards([])
    with pytest.raises(RecipeError, match="Cannot read the shard"):
        Shards([folder / "missing.tar"])
    with tarfile.open(folder / "3.tar.gz", "w:gz") as archive:
        archive.add(folder / "1.tar", "1.tar")
    with pytest.raises(RecipeError, match="gunzip"):
        Shards([folder / "3.tar.gz"])
    with tarfile.open(folder / "4.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.x"), io.BytesIO())
    with pytest.raises(RecipeError, match=r"a\.x twice in one sample"):
        Shards([folder / "4.tar"])


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        ("header", "header"),
        ("inside a file", "cut off"),
        ("inside a header", "middle of a header"),
        ("after a file", "no end mark"),
        ("joined", "behind its end mark"),
        ("zeros", "nothing but zeros"),
    ],
)
def test_a_damaged_shard_is_refused(folder: Path, damage: str, word: str) -> None:
    """With its name and where: no sample is missing without a word."""
    path = folder / "2.tar"
    whole = path.read_bytes()  # 28 files of a header and a block each
    at = {
        "header": 10 * 1024,
        "inside a file": 8 * 1024,
        "inside a header": 10 * 1024,
        "after a file": 10 * 1024,
        "joined": len(whole),
        "zeros": 10 * 1024,
    }[damage]
    flipped = bytearray(whole)
    flipped[at + 3 if at < len(whole) else 0] ^= 1
    path.write_bytes(
        {
            "header": bytes(flipped),
            "inside a file": whole[: at + 520],
            "inside a header": whole[: at + 100],
            "after a file": whole[:at],
            "joined": whole + (folder / "0.tar").read_bytes(),
            "zeros": whole[:at] + bytes(2 << 20),
        }[damage]
    )
    with pytest.raises(RecipeError) as caught:
        Shards([path])
    assert str(path) in str(caught.value)
    assert f"byte {at:,}" in str(caught.value)
    assert word in str(caught.value)


def test_a_bit_anywhere_in_a_header_is_seen(folder: Path) -> None:
    """Each byte that the header's sum covers."""
    path = folder / "1.tar"
    whole = path.read_bytes()
    for place in range(1024, 1024 + 512, 7):
        damaged = bytearray(whole)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(RecipeError):
            Shards([path])


def test_a_link_is_refused(folder: Path) -> None:
    """Its content stands somewhere else, and the sample would lack it."""
    with tarfile.open(folder / "3.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.x"), io.BytesIO())
        link = tarfile.TarInfo("b.x")
        link.type, link.linkname = tarfile.LNKTYPE, "a.x"
        archive.addfile(link)
    with pytest.raises(RecipeError, match=r"b\.x as a link to a\.x"):
        Shards([folder / "3.tar"])


def test_a_shard_that_was_exchanged_is_noticed(folder: Path) -> None:
    """When it is read and when it is opened, though size and time are those that were."""
    path = folder / "0.tar"
    shards = Shards([path])
    status = path.stat()
    names = [f"other/{number:03}.{kind}" for number in range(5) for kind in "xy"]
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"new"))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RecipeError, match="has changed"):
        shards[3]
    anew = Shards([path])
    assert anew[3] == {"__key__": "other/003", "x": b"new", "y": b"new"}


def test_the_same_samples_in_any_world(folder: Path, run: Commands) -> None:
    """In the same order on one rank and on three with workers, and after a resumption."""
    (run.folder / "shards.py").write_text(RECIPE)
    common = ("shards.py", "device=cpu", f"data={folder}", "record_samples=true")
    cache = {"XDG_CACHE_HOME": str(folder.parent / "cache")}
    for name, ranks, settings in (("one", "1", ()), ("three", "3", ("num_workers=2",))):
        command = ("launcher", "run", *common, *settings, "-n", ranks, "--out", name)
        done = run(*command, env=cache)
        assert done.exit_code == 0, done.stderr
    done = run(
        *("launcher", "run", *common, "-n", "2", "steps=2", "--out", "more"),
        env=cache,
    )
    assert done.exit_code == 0, done.stderr
    done = run("launcher", "resume", "more", "-n", "1", "steps=6", env=cache)
    assert done.exit_code == 0, done.stderr
    losses = {name: losses_of(run, name) for name in ("one", "three", "more")}
    assert len(losses["one"]) == 6
    assert losses["three"] == pytest.approx(losses["one"], rel=1e-5)
    taken = {name: taken_by(run, name, ranks) for name, ranks in WORLDS.items()}
    assert taken["one"] == taken["three"] == taken["more"]
    assert sorted(index for step in taken["one"][:3] for index in step) == list(range(20))


WORLDS = {"one": 1, "three": 3, "more": 2}


def losses_of(run: Commands, name: str) -> list[float]:
    """Return the loss of each step."""
    rows = read_lines(run.folder / name / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def taken_by(run: Commands, name: str, ranks: int) -> list[list[int]]:
    """Return the samples of each step over all ranks."""
    steps: dict[int, list[int]] = {}
    for rank in range(ranks):
        path = run.folder / name / f"samples/rank{rank}.jsonl"
        for row in read_lines(path) if path.exists() else ():
            steps.setdefault(row["step"], []).extend(sum(row["micro_batches"], []))  # noqa: RUF017
    return [sorted(steps[step]) for step in sorted(steps)]


def test_a_stream_is_refused(folder: Path, run: Commands) -> None:
    """What has no numbers cannot be shared exactly, and the error says what can."""
    (run.folder / "shards.py").write_text(RECIPE)
    done = run(
        *("launcher", "run", "shards.py", "-n", "1", "device=cpu", f"data={folder}", "kind=stream")
    )
    assert done.exit_code == 2
    assert "an iterable data set" in done.stderr
    assert "launcher.Shards" in done.stderr
