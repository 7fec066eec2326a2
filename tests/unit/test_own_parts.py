"""The parts of parameters that each rank fills when a model is built."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.debug import _clear_sharding_prop_cache
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher.engine.model.deferred import defer
from launcher.engine.state.initial_values import fragment, parts_of
from launcher.engine.state.meta_tensors import allocate_shards

# Timeouts can be set for gloo and NCCL; the fake group has none.
pytestmark = pytest.mark.filterwarnings("ignore:Set timeout is now only supported")


@contextmanager
def mesh_of(rank: int, names: tuple[str, str]) -> Iterator[DeviceMesh]:
    """Yield a mesh of 2 x 2 ranks, as one of them."""
    clear: Any = _clear_sharding_prop_cache
    clear()
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=4)
    try:
        yield init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
    finally:
        dist.destroy_process_group()


def small() -> nn.Sequential:
    """Return two layers with sizes that ranks do not share evenly."""
    return nn.Sequential(nn.Linear(6, 10), nn.Linear(10, 6))


@pytest.mark.parametrize("names", [("replicate", "shard"), ("shard", "tensor")])
def test_the_parts_of_a_mesh_make_the_model(names: tuple[str, str]) -> None:
    """On a mesh of two dimensions, the parts of all ranks are the model, once or with copies."""
    torch.manual_seed(1)
    expected = dict(small().named_parameters())
    found = {name: torch.full_like(p, torch.nan) for name, p in expected.items()}
    counts = {name: torch.zeros_like(p) for name, p in expected.items()}
    for rank in range(4):
        torch.manual_seed(1)
        model, values = defer(small)
        with mesh_of(rank, names) as mesh:
            if "tensor" in names:
                plan: Any = {"0": ColwiseParallel(), "1": RowwiseParallel()}
                parallelize_module(model, mesh["tensor"], plan)
                fully_shard(model, mesh=mesh["shard"])
            else:
                fully_shard(model, mesh=mesh)
            allocate_shards(model, torch.device("cpu"), torch.device("cpu"))
            parts = parts_of(model)
            values.fill(parts)
            for name, part in parts.items():
                for box, memory in part.pieces:
                    found[name].data[box.slices] = memory
                    counts[name].data[box.slices] += 1
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        copies = 2 if "replicate" in names or name == "1.bias" else 1
        assert torch.equal(counts[name], torch.full_like(tensor, copies)), name


def test_fragments_keep_what_they_partition() -> None:
    """The consecutive elements of three ranks make a tensor that they do not share evenly."""
    full: Tensor = torch.arange(20.0).view(4, 5)
    memories = [torch.full((7,), -1.0) for _ in range(3)]
    for rank, memory in enumerate(memories):
        fragment(full.shape, memory, 7 * rank).take(full)
    assert torch.cat(memories).tolist() == [*range(20), -1.0]
