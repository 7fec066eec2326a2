"""The process of a rank that writes its part of a checkpoint, and what replaces it."""

from __future__ import annotations

import json
import os
import resource
import select
import shutil
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save
from torch import Tensor

from launcher.engine.saving import shard_writer
from launcher.engine.saving.checkpoint_tensors import _DTYPES, describe_shard, write_shard
from launcher.engine.saving.shard_writer import PendingShard, ShardWriter
from launcher.engine.state.host_copies import HostCopies, HostMemory
from launcher.engine.state.shared_memory import SharedMemory
from launcher.engine.state.training_state import Snapshot
from launcher.runs.manifest import sum_file
from launcher.runs.shard_files import write_files

FILE = "shard-00001-model-00001-of-00001.safetensors"
WEIGHTS = {"large": torch.arange(3e6), "small": torch.arange(7.0)}
BUFFERS = {"buffer": torch.arange(6).view(2, 3).t(), "none": torch.zeros(0, 2)}
"""Tensors that are not copied to shared memory, of which one is not contiguous."""


@pytest.fixture
def writer() -> Iterator[ShardWriter]:
    """Give a writer, whose process ends with the test."""
    writer = ShardWriter()
    yield writer
    writer.close()


@pytest.fixture
def memory() -> Iterator[HostMemory]:
    """Give memory for copies."""
    memory = HostMemory(is_pinned=False)
    yield memory
    memory.free()


def start(writer: ShardWriter, folder: Path, memory: HostMemory) -> PendingShard:
    """Start to write a checkpoint of rank 0."""
    copies = HostCopies(WEIGHTS.items(), 0, 1, memory)
    state = Snapshot(
        tensors={**copies.tensors, **BUFFERS},
        memory=copies.memory,
        release=copies.release,
        values={},
        extra={},
    )
    return writer.start(folder, 0, state)


def written(pending: PendingShard) -> str | None:
    """Wait for a checkpoint, check what was written, and return the note about it."""
    pending.wait()
    assert pending.is_done
    assert pending.outcome.error is None
    expected = WEIGHTS | BUFFERS
    path = pending.folder / FILE
    found = load_file(path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    digest = sum_file(path)
    assert pending.outcome.num_bytes == digest.num_bytes
    sums = {FILE: {"num_bytes": digest.num_bytes, "sha256": digest.sha256}}
    assert json.loads((pending.folder / "rank0.json").read_text()) == sums
    return pending.outcome.note


def test_a_process_writes_what_this_process_would(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory
) -> None:
    """Checkpoints that the process writes have the bytes of those that the rank itself writes."""
    for name in ("first", "second"):
        assert written(start(writer, tmp_path / name, memory)) is None
    assert memory.num_bytes == sum(tensor.nbytes for tensor in WEIGHTS.values())
    (tmp_path / "here").mkdir()
    write_shard(tmp_path / "here", 0, WEIGHTS | BUFFERS)
    files = [(tmp_path / name / FILE).read_bytes() for name in ("first", "second", "here")]
    assert files[0] == files[1] == files[2]


def content(file: bytes) -> tuple[list[object], object, bytes]:
    """Return the header of a file, its metadata, and the bytes of its tensors."""
    end = 8 + int.from_bytes(file[:8], "little")
    header = json.loads(file[8:end])
    metadata = header.pop("__metadata__")
    return list(header.items()), metadata, file[end:]


def test_files_are_those_of_safetensors(tmp_path: Path) -> None:
    """For every dtype a file has the bytes that safetensors writes, in the same order."""
    values = torch.arange(96, dtype=torch.uint8).remainder(2)
    tensors: Mapping[str, Tensor] = {
        f'{number % 5} é"{number}': values[: 16 * (number % 5 + 1)].clone().view(dtype)
        for number, dtype in enumerate(_DTYPES)
    } | {"scalar": torch.tensor(2.5), "empty": torch.zeros(3, 0)}
    write_shard(tmp_path, 0, tensors)
    offsets = {name: {"saved_offsets": [0] * tensor.dim()} for name, tensor in tensors.items()}
    metadata = {"DCP_SHARDING_INFO": json.dumps(offsets), "DCP_VERSION": "1.0", "format": "pt"}
    file, expected = (tmp_path / FILE).read_bytes(), save(dict(tensors), metadata)
    assert len(file) == len(expected)
    assert content(file) == content(expected)


def test_a_dtype_without_a_word_is_an_error(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory
) -> None:
    """A tensor that the format cannot hold is named, and the copies are given back."""
    copies = HostCopies([("weight", torch.ones(2, dtype=torch.complex128))], 0, 1, memory)
    state = Snapshot(
        tensors=copies.tensors, memory=copies.memory, release=copies.release, values={}, extra={}
    )
    pending = writer.start(tmp_path / "step", 0, state)
    assert pending.is_done
    assert "weight has dtype torch.complex128" in str(pending.outcome.error)
    assert memory.num_bytes == 32


def test_a_killed_process_costs_no_checkpoint(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory
) -> None:
    """A thread writes in place of a process that was killed; the next checkpoint has a new one."""
    process = writer.process()
    os.kill(process.pid, signal.SIGKILL)
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    note = written(start(writer, tmp_path / "first", memory))
    assert note is not None
    assert "SIGKILL" in note
    assert written(start(writer, tmp_path / "second", memory)) is None
    assert writer.process().pid != process.pid


def test_a_process_that_is_killed_while_it_writes_costs_no_checkpoint(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory
) -> None:
    """Files that were begun are written anew."""
    (tmp_path / "step").mkdir()
    (tmp_path / "step" / FILE).write_text("the beginning of a file")
    os.kill(writer.process().pid, signal.SIGSTOP)
    pending = start(writer, tmp_path / "step", memory)
    assert not pending.is_done
    os.kill(writer.process().pid, signal.SIGKILL)
    note = written(pending)
    assert note is not None
    assert "SIGKILL" in note


def test_a_thread_writes_where_no_process_can_start(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a process a thread writes each checkpoint, and the first one says why."""
    monkeypatch.setattr(sys, "executable", str(tmp_path / "missing"))
    note = written(start(writer, tmp_path / "first", memory))
    assert note is not None
    assert "No such file" in note
    assert written(start(writer, tmp_path / "second", memory)) is None


def test_a_refusal_of_the_disk_is_reported(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory
) -> None:
    """What the process may not write is one error, and the next checkpoint has its chance."""
    pid = writer.process().pid
    limits = resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, resource.RLIM_INFINITY))
    pending = start(writer, tmp_path / "first", memory)
    pending.wait()
    assert pending.outcome.error == "File too large"
    assert memory.num_bytes > 0
    resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
    assert written(start(writer, tmp_path / "second", memory)) is None
    (tmp_path / "file").touch()
    assert start(writer, tmp_path / "file" / "step", memory).outcome.error == "Not a directory"


def test_signals_to_all_processes_of_a_job_do_not_end_it(
    tmp_path: Path, writer: ShardWriter, memory: HostMemory
) -> None:
    """The signals that ask a run to stop leave the process to write the run's last checkpoint."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
        os.kill(writer.process().pid, number)
    assert written(start(writer, tmp_path / "step", memory)) is None


def test_a_removed_folder_takes_no_files(tmp_path: Path) -> None:
    """A process that outlives its rank writes nothing into the folder of the rank's successor."""
    folder, memory = tmp_path / "step", SharedMemory()
    folder.mkdir()
    descriptor = os.open(folder, os.O_RDONLY)
    place = describe_shard(0, WEIGHTS, memory)
    shutil.rmtree(folder)
    folder.mkdir()
    with pytest.raises(FileNotFoundError):
        write_files(memory.descriptor, descriptor, place)
    assert not list(folder.iterdir())
    os.close(descriptor)
    memory.close()


def test_a_process_ends_with_its_rank() -> None:
    """The process is gone once its rank was killed, also if another process has its socket."""
    reader, sender = os.pipe()
    rank = os.fork()
    if rank == 0:
        process = shard_writer._WriterProcess()
        worker = os.fork()  # as one that reads data
        if worker:
            os.write(sender, f"{process.pid} {worker}".encode())
        signal.pause()
    pid, worker = map(int, os.read(reader, 40).split())
    descriptor = os.pidfd_open(pid)
    os.kill(rank, signal.SIGKILL)
    os.waitpid(rank, 0)
    ends = select.poll()
    ends.register(descriptor, select.POLLIN)
    has_ended = bool(ends.poll(10_000))
    os.kill(worker, signal.SIGKILL)
    assert has_ended
    for each in (reader, sender, descriptor):
        os.close(each)
