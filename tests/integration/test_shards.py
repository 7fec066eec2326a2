"""Tests of `Shards`: random access to samples in tar files."""

from __future__ import annotations

import io
import os
import tarfile
from pathlib import Path
from random import Random

import numpy as np
import pytest
from range_server import serve
from support import Commands, read_lines

from launcher import RecipeError, RemoteCache, Shards

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

        members = {"__iter__": lambda self: iter(range(8))}
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
    data = tmp_path / "data"
    data.mkdir()
    index = 0
    for shard, num_samples in enumerate((5, 1, 14)):
        with tarfile.open(data / f"{shard}.tar", "w") as archive:
            for _ in range(num_samples):
                values = np.full(4, index, np.float32).tobytes()
                for extension, content in (("x", values), ("y", str(index).encode())):
                    member = tarfile.TarInfo(f"some/{index:03}.{extension}")
                    member.size = len(content)
                    archive.addfile(member, io.BytesIO(content))
                index += 1
    return data


def test_samples_are_read_by_index(folder: Path, tmp_path: Path) -> None:
    """Samples can be read by index in any order, with a new index as with a cached one."""
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


def test_shards_at_urls_are_downloaded_when_they_are_read(folder: Path, tmp_path: Path) -> None:
    """Shards at URLs have the samples of local ones; a known index needs no download."""
    local = Shards(sorted(folder.glob("*.tar")))
    with serve(folder) as server:
        urls = [f"{server.url}/{number}.tar" for number in range(3)]
        for folder_name, requests in (("first", 1), ("second", 2)):
            cache = RemoteCache(folder=tmp_path / folder_name)
            shards = Shards(urls, cache=cache)
            assert shards.chunks == local.chunks == [5, 1, 14]
            assert [shards[index] for index in (0, 19, 3)] == [local[index] for index in (0, 19, 3)]
            assert shards.fingerprint() == local.fingerprint()
            assert server.requests["0.tar"] == requests
        assert server.requests["1.tar"] == 1
        (folder / "1.tar").write_bytes((folder / "1.tar").read_bytes()[:-9000])
        with pytest.raises(RecipeError, match=rf"The shard {urls[1]} is not a complete tar"):
            Shards(urls, cache=cache)


def test_a_rewritten_shard_is_indexed_again(folder: Path) -> None:
    """The cached index of a shard is not used after the shard was rewritten."""
    assert len(Shards([folder / "1.tar"])) == 1
    (folder / "1.tar").write_bytes((folder / "0.tar").read_bytes())
    assert len(Shards([folder / "1.tar"])) == 5


def test_a_damaged_cached_index_is_replaced(folder: Path, tmp_path: Path) -> None:
    """A damaged index in the cache is ignored and written again."""
    assert len(Shards([folder / "0.tar"])) == 5
    (cached,) = (tmp_path / "cache/launcher/shards").iterdir()
    content = cached.read_bytes()
    for damaged in (content[:-30], content[: len(content) // 2], b"", b"else"):
        cached.write_bytes(damaged)
        assert len(Shards([folder / "0.tar"])) == 5
        assert cached.read_bytes() != damaged


def test_unusable_files_are_refused(folder: Path) -> None:
    """No files, and missing, compressed or ambiguous tar files, raise a RecipeError."""
    with pytest.raises(RecipeError, match="no files"):
        Shards([])
    with pytest.raises(RecipeError, match=r"missing\.tar"):
        Shards([folder / "missing.tar"])
    with tarfile.open(folder / "3.tar.gz", "w:gz") as archive:
        archive.add(folder / "1.tar", "1.tar")
    with pytest.raises(RecipeError, match="gunzip"):
        Shards([folder / "3.tar.gz"])
    with tarfile.open(folder / "4.tar", "w") as archive:
        for _ in range(2):
            archive.addfile(tarfile.TarInfo("a.x"), io.BytesIO())
    with pytest.raises(RecipeError, match=r"a\.x twice"):
        Shards([folder / "4.tar"])


@pytest.mark.parametrize(
    ("damage", "fragment"),
    [
        ("header", "header"),
        ("inside a file", "cut off"),
        ("inside a header", "middle of a header"),
        ("after a file", "missing"),
        ("joined", "concatenated"),
        ("zeros", "only zeros"),
    ],
)
def test_a_damaged_shard_is_refused(folder: Path, damage: str, fragment: str) -> None:
    """A damaged shard raises a RecipeError with its path, the position and the damage."""
    path = folder / "2.tar"
    content = path.read_bytes()  # 28 files, each with one header block and one content block
    offset = {
        "header": 10 * 1024,
        "inside a file": 8 * 1024,
        "inside a header": 10 * 1024,
        "after a file": 10 * 1024,
        "joined": len(content),
        "zeros": 10 * 1024,
    }[damage]
    flipped = bytearray(content)
    flipped[offset + 3 if offset < len(content) else 0] ^= 1
    path.write_bytes(
        {
            "header": bytes(flipped),
            "inside a file": content[: offset + 520],
            "inside a header": content[: offset + 100],
            "after a file": content[:offset],
            "joined": content + (folder / "0.tar").read_bytes(),
            "zeros": content[:offset] + bytes(2 << 20),
        }[damage]
    )
    with pytest.raises(RecipeError) as caught:
        Shards([path])
    assert str(path) in str(caught.value)
    assert f"byte {offset:,}" in str(caught.value)
    assert fragment in str(caught.value)


def test_any_flipped_bit_in_a_header_is_detected(folder: Path) -> None:
    """A flipped bit in any tested byte of a header raises a RecipeError."""
    path = folder / "1.tar"
    content = path.read_bytes()
    for position in range(1024, 1024 + 512, 7):
        damaged = bytearray(content)
        damaged[position] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(RecipeError):
            Shards([path])


def test_a_link_is_refused(folder: Path) -> None:
    """A link in a shard raises a RecipeError, because its content is stored elsewhere."""
    with tarfile.open(folder / "3.tar", "w") as archive:
        archive.addfile(tarfile.TarInfo("a.x"), io.BytesIO())
        link = tarfile.TarInfo("b.x")
        link.type, link.linkname = tarfile.LNKTYPE, "a.x"
        archive.addfile(link)
    with pytest.raises(RecipeError, match=r"b\.x as a link to a\.x"):
        Shards([folder / "3.tar"])


def write_tar(path: Path, *names: str) -> None:
    """Write a tar of empty files, in the format that holds any name."""
    with tarfile.open(path, "w", format=tarfile.PAX_FORMAT) as archive:
        for name in names:
            archive.addfile(tarfile.TarInfo(name), io.BytesIO())


def test_names_in_a_shard_lead_nowhere(folder: Path) -> None:
    """Names of files are the keys of samples, whatever they hold, and nothing is written."""
    names = ["/etc/passwd.x", "../../up.x", "a\nb\x1b[2J.x", "caf\udce9.x", ".x", "x"]
    write_tar(folder / "3.tar", *names)
    before = sorted(folder.rglob("*"))
    for _ in range(2):
        shards = Shards([folder / "3.tar"])
        keys = [shards[index]["__key__"] for index in range(len(shards))]
        assert keys == ["/etc/passwd", "../../up", "a\nb\x1b[2J", "caf\udce9", "", "x"]
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    ("names", "shown"),
    [
        (["0.x", "a" * 5000 + ".x"], "aaa"),
        (["0.x", "0.__key__"], "0.__key__"),
        (["\x1b[2J.x", "\x1b[2J.x"], "\\x1b[2J.x twice"),
    ],
)
def test_a_name_that_no_sample_can_have_is_refused(
    folder: Path, names: list[str], shown: str
) -> None:
    """A name that is far too long, taken or given twice is one short error with the name."""
    write_tar(folder / "3.tar", *names)
    with pytest.raises(RecipeError, match=r"3\.tar") as caught:
        Shards([folder / "3.tar"])
    assert shown in str(caught.value)
    assert len(str(caught.value)) < 1000
    assert "\x1b" not in str(caught.value)


def test_only_regular_files_are_shards(folder: Path) -> None:
    """A FIFO, a folder, a device and a name that no file can have are refused at once."""
    os.mkfifo(folder / "fifo.tar")
    for path in (folder / "fifo.tar", folder, Path("/dev/zero"), Path("a\0b"), Path("a" * 300)):
        with pytest.raises(RecipeError, match="shard"):
            Shards([path])


def test_a_changed_cached_index_gives_the_same_samples(folder: Path, tmp_path: Path) -> None:
    """Whatever bytes of a cached index change, the samples are those of the shard."""
    paths = [folder / "2.tar"]
    expected = list(map(Shards(paths).__getitem__, range(14)))
    (cached,) = (tmp_path / "cache/launcher/shards").iterdir()
    content, random = cached.read_bytes(), Random(0)
    for _ in range(150):
        damaged = bytearray(content)
        for position in random.choices(range(len(content)), k=4):
            damaged[position] ^= random.randrange(1, 256)
        cached.write_bytes(damaged)
        assert list(map(Shards(paths).__getitem__, range(14))) == expected
    cached.unlink()
    os.mkfifo(cached)
    assert Shards(paths)[3] == expected[3]


def test_a_replaced_shard_is_detected(folder: Path) -> None:
    """A replaced shard of the same size and time is detected on reading and on opening."""
    path = folder / "0.tar"
    shards = Shards([path])
    status = path.stat()
    names = [f"other/{index:03}.{extension}" for index in range(5) for extension in "xy"]
    with tarfile.open(path, "w") as archive:
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = 3
            archive.addfile(member, io.BytesIO(b"new"))
    assert path.stat().st_size == status.st_size
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    with pytest.raises(RecipeError, match="changed"):
        shards[3]
    reopened = Shards([path])
    assert reopened[3] == {"__key__": "other/003", "x": b"new", "y": b"new"}


def test_the_samples_of_a_step_do_not_depend_on_the_ranks(folder: Path, run: Commands) -> None:
    """Each step takes the same samples on one rank, on three with workers, and when resumed."""
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
    samples = {name: samples_of(run, name, ranks) for name, ranks in WORLDS.items()}
    assert samples["one"] == samples["three"] == samples["more"]
    assert sorted(index for step in samples["one"][:3] for index in step) == list(range(20))


WORLDS = {"one": 1, "three": 3, "more": 2}


def losses_of(run: Commands, name: str) -> list[float]:
    """Return the loss of each step."""
    rows = read_lines(run.folder / name / "metrics.jsonl")
    return [row["loss"] for row in rows if "loss" in row]


def samples_of(run: Commands, name: str, ranks: int) -> list[list[int]]:
    """Return the sorted samples of each step over all ranks."""
    steps: dict[int, list[int]] = {}
    for rank in range(ranks):
        path = run.folder / name / f"samples/rank{rank}.jsonl"
        for row in read_lines(path) if path.exists() else ():
            steps.setdefault(row["step"], []).extend(sum(row["micro_batches"], []))  # noqa: RUF017
    return [sorted(steps[step]) for step in sorted(steps)]


def test_epochs_of_a_stream_need_its_length(folder: Path, run: Commands) -> None:
    """An iterable data set has no epochs, unless the recipe states train_samples."""
    (run.folder / "shards.py").write_text(RECIPE)
    done = run(
        *("launcher", "run", "shards.py", "-n", "1", "device=cpu", f"data={folder}", "kind=stream")
    )
    assert done.exit_code == 2
    assert "train_samples" in done.stderr
