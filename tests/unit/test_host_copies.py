"""The memory of the copies from which checkpoints are written."""

from __future__ import annotations

import re
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


@pytest.fixture
def group() -> Iterator[None]:
    """Be the only process of a group."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def addresses(copies: HostCopies) -> dict[str, int]:
    """Return where each copy is."""
    return {name: tensor.data_ptr() for name, tensor in lent(copies).items()}


def lent(copies: HostCopies) -> dict[str, Tensor]:
    """Return the memory of each copy."""
    return copies._lent.tensors


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
    memory = HostMemory(is_pinned=False)
    first = HostCopies(state_of(1.0).items(), 0, 1, memory)
    before = addresses(first)
    assert len(before) == 3
    assert memory.num_bytes == 0
    first.release()
    assert memory.num_bytes == 17 * 4
    second = HostCopies(state_of(2.0).items(), 0, 1, memory)
    assert addresses(second) == before
    assert all(bool((tensor == 2).all()) for tensor in lent(second).values())
    fragment = second.tensors["fragment"]
    assert isinstance(fragment, Fragment)
    assert (fragment.start, fragment.size) == (0, (2, 3))


@pytest.mark.usefixtures("group")
def test_copies_that_are_read_are_not_overwritten() -> None:
    """Copies that are made before others were released lie elsewhere."""
    memory = HostMemory(is_pinned=False)
    first = HostCopies(state_of(1.0).items(), 0, 1, memory)
    second = HostCopies(state_of(2.0).items(), 0, 1, memory)
    assert not set(addresses(first).values()) & set(addresses(second).values())
    assert all(bool((tensor == 1).all()) for tensor in lent(first).values())
    first.release()
    second.release()
    assert memory.num_bytes == 17 * 4, "only one set of copies is kept"


def test_memory_of_another_shape_or_dtype_is_not_used_again() -> None:
    """A tensor that has changed gets memory of its own, and no memory of former ones is kept."""
    memory = HostMemory(is_pinned=False)
    for tensor in (torch.ones(3), torch.ones(4), torch.ones(4, dtype=torch.float64)):
        copies = HostCopies([("weight", tensor)], 0, 1, memory)
        assert torch.equal(lent(copies)["weight"], tensor)
        copies.release()
        HostCopies([("weight", tensor)], 0, 1, memory).release()
        assert memory.num_bytes == tensor.nbytes


def shared_bytes() -> int:
    """Return the resident bytes of this process that other processes could share."""
    found = re.search(
        r"^RssShmem:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE
    )
    assert found is not None
    return int(found[1]) * 1024


def test_freed_memory_returns_to_the_system() -> None:
    """At the end of a run idle memory is freed at once, and lent memory when it is given back."""
    num_bytes, before = 16 << 20, shared_bytes()
    memory = HostMemory(is_pinned=False)
    weight = torch.ones(num_bytes // 4)
    idle, pending = (HostCopies([("weight", weight)], 0, 1, memory) for _ in range(2))
    assert shared_bytes() - before >= 2 * num_bytes
    idle.release()
    assert memory.num_bytes == num_bytes
    memory.free()
    assert memory.num_bytes == 0
    assert shared_bytes() - before < 1.5 * num_bytes
    assert torch.equal(lent(pending)["weight"], weight)
    pending.release()
    assert shared_bytes() - before < num_bytes // 2
