"""Tests of DataLoader workers: shared files, batches that cannot be sent, and start methods."""

from __future__ import annotations

import gc
import multiprocessing
import os
import resource
import threading
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
import small_runs
import torch

from launcher import Data, SampleError
from launcher.engine.data.loader_workers import check_sendable, raise_open_files, start_worker
from launcher.engine.data.open_files import open_files
from launcher.engine.data.prefetching import prefetch
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest


def numbers() -> Any:
    """Yield one number, as a generator that cannot be pickled."""
    yield 1


def unsendable() -> list[Any]:
    """Return batches that cannot be pickled."""

    @dataclass
    class Local:
        x: int

    with_gradient = torch.ones(2, requires_grad=True) * 2
    pair = namedtuple("pair", "x")  # pickle cannot find a type defined in a function
    return [Local(1), pair(2), threading.Lock(), numbers(), lambda: 1, {"x": [with_gradient]}]


@pytest.mark.parametrize("index", range(6))
def test_an_unsendable_batch_is_refused_with_its_type(index: int) -> None:
    """A batch that cannot be pickled raises a SampleError that names its type."""
    batch = unsendable()[index]
    with pytest.raises(SampleError) as caught:
        check_sendable(batch, "train")
    assert type(batch).__name__ in str(caught.value)


def test_the_check_has_no_side_effects() -> None:
    """Checking a batch moves no tensor to shared memory, opens no file and starts no thread."""
    tensor = torch.ones(1000)
    before = open_files(), threading.active_count()
    check_sendable({"x": [tensor, tensor[:3]], "y": ("text", 1, None)}, "train")
    assert (open_files(), threading.active_count()) == before
    assert not tensor.is_shared()  # type: ignore[no-untyped-call]


def test_a_worker_has_no_memory_limit_of_its_rank() -> None:
    """The limit that a search for a batch size sets on a rank is lifted in its workers."""
    parent = os.getpid()
    if (child := os.fork()) == 0:
        hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
        resource.setrlimit(resource.RLIMIT_DATA, (1 << 34, hard_limit))
        start_worker(parent, 0)
        os._exit(int(resource.getrlimit(resource.RLIMIT_DATA) != (hard_limit, hard_limit)))
    assert os.waitpid(child, 0)[1] == 0


@pytest.mark.parametrize("soft", [64, 1 << 16])
def test_a_rank_may_have_as_many_files_open_as_its_hard_limit_allows(soft: int) -> None:
    """The limit of open files rises to the hard limit, at most to 65,536, and never falls."""
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    most = 1 << 16 if hard == resource.RLIM_INFINITY else min(hard, 1 << 16)
    if (child := os.fork()) == 0:
        resource.setrlimit(resource.RLIMIT_NOFILE, (min(soft, most), hard))
        raise_open_files()
        os._exit(int(resource.getrlimit(resource.RLIMIT_NOFILE) != (most, hard)))
    assert os.waitpid(child, 0)[1] == 0


def read_and_exit() -> None:
    """Read a micro-batch with a worker, and leave the loader to the garbage collector."""
    gc.disable()
    requests = [MicroBatchRequest("train", 0, [index], has_weight=True) for index in range(100)]
    reader = Reader(small_runs.recipe(), Data(train=[torch.ones(1)] * len(requests)))
    cycle: list[Any] = [prefetch(reader, requests, workers=1, method="fork")]
    next(cycle[0])
    cycle.append(cycle)


def test_a_process_ends_that_still_has_a_loader() -> None:
    """A process that exits ends the workers of a loader that is in a reference cycle."""
    process = multiprocessing.get_context("fork").Process(target=read_and_exit)
    process.start()
    process.join(60)
    exit_code = process.exitcode
    process.kill()
    process.join()
    assert exit_code == 0
