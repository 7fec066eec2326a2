"""Threads that read the samples of a micro-batch: the same samples, and what is refused."""

from __future__ import annotations

import os
import pickle
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import small_runs
import torch
from torch import Tensor

from launcher import Data, RecipeError, SampleError, Stream
from launcher.engine.data.data_files import DataFiles
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.reader import Reader
from launcher.engine.data.sample_threads import SampleThreads
from launcher.engine.data.sampler import MicroBatchRequest


class Samples:
    """Vectors that are read in different ways.

    Args:
        kind: The way.
        path: A file of float32 numbers.
    """

    def __init__(self, kind: str = "good", path: Path = Path()) -> None:
        self.kind, self.path = kind, path
        self.index, self.file, self.files = 0, -1, threading.local()
        self.readers: set[int] = set()

    def __len__(self) -> int:
        return 64

    def __getitem__(self, index: int) -> Tensor:
        self.readers.add(threading.get_ident())
        if self.kind == "broken" and index == 21:
            raise OSError("truncated file")
        if self.kind == "file":
            if self.file < 0:
                self.file = os.open(self.path, os.O_RDONLY)
            return self.from_file(self.file, index)
        if self.kind == "own file":
            if not hasattr(self.files, "file"):
                self.files.file = os.open(self.path, os.O_RDONLY)
            return self.from_file(self.files.file, index)
        if self.kind == "state":
            self.index = index
            time.sleep(0.0002)
            return torch.full((4,), float(self.index))
        if self.kind == "restores":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(index)
                time.sleep(0.0005)
                return torch.rand(4)
        if self.kind == "draws" or (self.kind == "draws late" and index % 8 == 5):
            return torch.rand(4)
        time.sleep(0.0005)
        return torch.full((4,), float(index)).sin()

    def from_file(self, file: int, index: int) -> Tensor:
        """Read a sample through the position of a file."""
        time.sleep(0.0005)
        os.lseek(file, 16 * index, os.SEEK_SET)
        return torch.frombuffer(bytearray(os.read(file, 16)), dtype=torch.float32)


@pytest.fixture
def numbers(tmp_path: Path) -> Path:
    """Return a file of the numbers from 0 to 255."""
    path = tmp_path / "numbers.bin"
    path.write_bytes(torch.arange(256, dtype=torch.float32).numpy().tobytes())
    return path


def read(data: Any, threads: int, indices: range = range(16, 32), **options: Any) -> Any:
    """Return what a reader with some threads returns for a request."""
    changes = {name: options.pop(name) for name in ("bad_samples",) if name in options}
    recipe = small_runs.recipe(worker_threads=threads, **changes)
    request = MicroBatchRequest("train", 1, list(indices), has_weight=True, **options)
    return Reader(recipe, Data(train=data))[request]


@pytest.mark.parametrize("kind", ["good", "own file", "draws", "draws late"])
def test_threads_read_the_same_samples(kind: str, numbers: Path) -> None:
    """A micro-batch is equal to the bit, with one thread and several, even if samples draw."""
    alone, together = Samples(kind, numbers), Samples(kind, numbers)
    one, several = read(alone, 1), read(together, 4)
    assert torch.equal(one.batch, several.batch)
    assert len(alone.readers) == 1
    assert len(together.readers) > 1


@pytest.mark.parametrize(
    ("kind", "fragment"),
    [
        ("draws", "random numbers"),
        ("draws late", "random numbers"),
        ("restores", "sample"),
        ("state", "sample"),
        ("file", "numbers.bin"),
    ],
)
def test_what_threads_must_not_read_is_refused(kind: str, fragment: str, numbers: Path) -> None:
    """The trial refuses samples that draw, that share state or that share a file's position."""
    error = read(Samples(kind, numbers), 4, range(8), trial=True)
    assert isinstance(error, RecipeError), error
    for part in (fragment, "worker_threads=4", "num_workers"):
        assert part in str(error)
    assert isinstance(read(Samples(kind, numbers), 1, range(8), trial=True), MicroBatch)


@pytest.mark.parametrize("kind", ["good", "own file"])
def test_what_threads_may_read_passes_the_trial(kind: str, numbers: Path) -> None:
    """The trial accepts samples without shared state."""
    assert isinstance(read(Samples(kind, numbers), 4, range(8), trial=True), MicroBatch)


def test_a_bad_sample_is_named_and_left_out() -> None:
    """With threads too, an exception names its sample, and bad_samples=skip leaves that one out."""
    error = read(Samples("broken"), 4)
    assert isinstance(error, SampleError)
    assert "raised OSError for sample 21 (epoch 1)" in str(error)
    skipped = read(Samples("broken"), 4, bad_samples="skip")
    assert [bad.sample for bad in skipped.bad] == [21]
    assert skipped.request.indices == [index for index in range(16, 32) if index != 21]


def test_a_forked_process_starts_its_own_threads() -> None:
    """Threads that have read in a process read in its forked child too."""
    threads = SampleThreads(2)
    assert threads.read(abs, [-1, -2, -3]) == [1, 2, 3]
    if (child := os.fork()) == 0:
        os._exit(int(threads.read(abs, [-4, -5]) != [4, 5]))
    assert os.waitpid(child, 0)[1] == 0


def test_threads_and_a_stream_are_refused(tmp_path: Path) -> None:
    """A stream is read by one thread, so worker_threads is an error that says so."""
    stream = Stream(lambda: iter(torch.ones(64, 4)))
    recipe = small_runs.recipe(
        data=lambda: Data(train=stream), epochs=None, steps=2, train_samples=None, worker_threads=2
    )
    with pytest.raises(RecipeError, match="stream"):
        small_runs.train(tmp_path / "run", recipe)


def test_threads_have_their_own_open_files(numbers: Path) -> None:
    """Each thread of a process reads a store's files through a descriptor of its own."""
    files = DataFiles([numbers])
    descriptors = [files.descriptor(0)]
    thread = threading.Thread(target=lambda: descriptors.append(files.descriptor(0)))
    thread.start()
    thread.join()
    assert len(set(descriptors)) == 2
    assert pickle.loads(pickle.dumps(files)).read(0, 4, 0) == bytes(4)
