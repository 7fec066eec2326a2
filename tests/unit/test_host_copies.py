"""The memory of the copies from which checkpoints are written."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from launcher.engine.state.fragments import Fragment
from launcher.engine.state.host_copies import HostCopies, HostMemory
from launcher.engine.state.training_state import Snapshot
from launcher.engine.training import checkpoint_manager
from launcher.engine.training.checkpoint_manager import _ShardWriter


@pytest.fixture
def group() -> Iterator[None]:
    """Be the only process of a group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def addresses(copies: HostCopies) -> dict[str, int]:
    """Return where each copy is."""
    return {name: tensor.data_ptr() for name, tensor in copies._lent.items()}


def state_of(step: float) -> dict[str, Tensor | Fragment]:
    """Return a full tensor, a shard and a fragment whose values are `step`."""
    mesh = init_device_mesh("cpu", (1,))
    values = torch.full((6,), step)
    return {
        "full": torch.full((4, 2), step),
        "shard": distribute_tensor(torch.full((3,), step), mesh, [Shard(0)]),
        "fragment": Fragment(values=values, start=0, size=torch.Size((2, 3))),
    }


@pytest.mark.usefixtures("group")
def test_memory_is_used_again_after_it_was_given_back() -> None:
    """A second set of copies lies where the first did, and has the values of its own step."""
    memory = HostMemory(is_kept=True)
    first = HostCopies(state_of(1.0).items(), 0, 1, memory)
    before = addresses(first)
    assert len(before) == 3
    assert memory.num_bytes == 0
    first.release()
    assert memory.num_bytes == 17 * 4
    second = HostCopies(state_of(2.0).items(), 0, 1, memory)
    assert addresses(second) == before
    assert all(bool((tensor == 2).all()) for tensor in second._lent.values())
    fragment = second.tensors["fragment"]
    assert isinstance(fragment, Fragment)
    assert (fragment.start, fragment.size) == (0, (2, 3))


@pytest.mark.usefixtures("group")
def test_copies_that_are_read_are_not_overwritten() -> None:
    """Copies that are made before others were released lie elsewhere."""
    memory = HostMemory(is_kept=True)
    first = HostCopies(state_of(1.0).items(), 0, 1, memory)
    second = HostCopies(state_of(2.0).items(), 0, 1, memory)
    assert not set(addresses(first).values()) & set(addresses(second).values())
    assert all(bool((tensor == 1).all()) for tensor in first._lent.values())
    first.release()
    second.release()
    assert memory.num_bytes == 17 * 4, "only one set of copies is kept"


def test_memory_of_another_shape_or_dtype_is_not_used_again() -> None:
    """A tensor that has changed gets memory of its own, and the former memory is dropped."""
    memory = HostMemory(is_kept=True)
    for tensor in (torch.ones(3), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        copies = HostCopies([("weight", tensor)], 0, 1, memory)
        assert torch.equal(copies._lent["weight"], tensor)
        copies.release()
        assert memory.num_bytes == tensor.nbytes


def test_freed_memory_stays_free() -> None:
    """At the end of a run idle memory is freed at once, and lent memory when it is given back."""
    memory = HostMemory(is_kept=True)
    idle = HostCopies([("weight", torch.ones(3))], 0, 1, memory)
    idle.release()
    pending = HostCopies([("bias", torch.ones(3))], 0, 1, memory)
    assert memory.num_bytes == 12
    memory.free()
    assert memory.num_bytes == 0
    assert torch.equal(pending._lent["bias"], torch.ones(3))
    pending.release()
    assert memory.num_bytes == 0


def test_pageable_memory_is_not_kept() -> None:
    """Without a GPU the memory of copies returns to the system when they have been written."""
    memory = HostMemory(is_kept=False)
    HostCopies([("weight", torch.ones(3))], 0, 1, memory).release()
    assert memory.num_bytes == 0


@pytest.mark.parametrize("fails", [False, True])
def test_a_writer_gives_its_memory_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, fails: bool
) -> None:
    """The thread that writes holds the copies until it has written them, or has failed to."""
    memory = HostMemory(is_kept=True)
    copies = HostCopies([("weight", torch.ones(3))], 0, 1, memory)
    state = Snapshot(tensors=copies.tensors, values={}, extra={}, release=copies.release)
    reads, may_end = threading.Event(), threading.Event()

    def write(*_: object) -> None:
        reads.set()
        assert may_end.wait(10)
        if fails:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint_manager, "write_shard", write)
    writer = _ShardWriter(tmp_path, 0, state, torch.device("cpu"))
    assert reads.wait(10)
    assert memory.num_bytes == 0
    may_end.set()
    writer.wait()
    assert memory.num_bytes == 12
    assert (writer.error is not None) is fails
