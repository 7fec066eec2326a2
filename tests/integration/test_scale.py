"""Large worlds: hundreds of ranks in one process, and plans for 10,000."""

from __future__ import annotations

import json
import logging
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support import Commands
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.testing._internal.distributed.fake_pg import FakeStore

from launcher import Plan, make_plan, read_machine
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.engine.saving.checkpoint_tensors import StoredState, write_shard
from launcher.engine.state.host_copies import HostCopies, HostMemory
from launcher.engine.state.training_state import live_tensors
from launcher.recipes.digits import digits
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.manifest import FORMAT, Manifest

RANKS = 1024
WRITERS = 256
"""Ranks that write a checkpoint; each shards a model of its own."""

HELD_OUT = (EvaluationSchedule(samples=4_099),)


def plan_of(world_size: int, samples: int, batch_size: int) -> Plan:
    """Return a plan for CPU ranks, eight on each node."""
    recipe = replace(
        digits(),
        batch_size=batch_size,
        micro_batch_size=3,
        train_samples=samples,
        device="cpu",
    )
    return make_plan(recipe, read_machine(), nodes=world_size // 8, nproc_per_node=8)


@contextmanager
def fake_rank(rank: int) -> Iterator[None]:
    """Be one of `WRITERS` ranks, in a process group whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=WRITERS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_each_sample_is_taken_once_with_equal_weight() -> None:
    """The steps of an epoch on 1,024 ranks take each sample once, with equal weights."""
    samples, batch = 30_011, 6_001
    plan = plan_of(RANKS, samples, batch)
    samplers = [
        Sampler(plan=plan, rank=rank, train_samples=samples, evaluations=HELD_OUT)
        for rank in range(RANKS)
    ]
    assert plan.steps_per_epoch == 6
    streams = [sampler.requests() for sampler in samplers]
    epoch: list[int] = []
    for step in range(6):
        size, micro_steps = samplers[0].window(step).size, samplers[0].micro_steps(step)
        batch_ids: list[int] = []
        weight = Fraction(0)
        for stream in streams:
            for _ in range(micro_steps):
                request = next(stream)
                assert request.split == "train"
                if request.has_weight:
                    batch_ids += request.indices
                    # The loss is the mean over ranks of (sum of losses) x world size / samples.
                    weight += Fraction(len(request.indices) * RANKS, size) / RANKS
        assert batch_ids == samplers[0].batch_ids(step)
        assert weight == 1
        epoch += batch_ids
    assert sorted(epoch) == list(range(samples))
    evaluated = [
        index
        for stream in streams
        for _ in range(samplers[0].evaluation_steps(HELD_OUT[0]))
        for request in [next(stream)]
        if request.has_weight
        for index in request.indices
    ]
    assert sorted(evaluated) == list(range(4_099))


def test_every_rank_takes_part_in_a_small_last_batch() -> None:
    """Ranks without a sample in a small last batch still take a micro-batch, with weight 0."""
    plan = plan_of(RANKS, 6_100, 6_000)
    num_counted = 0
    for rank in range(RANKS):
        sampler = Sampler(plan=plan, rank=rank, train_samples=6_100)
        requests = [next(sampler.requests(1)) for _ in range(sampler.micro_steps(1))]
        assert len(requests) == 1
        assert requests[0].indices
        num_counted += requests[0].has_weight
    assert num_counted == 100


def test_memory_for_sample_indices_depends_on_the_share_alone() -> None:
    """A rank's indices of a step take less than 1 MiB in any world and for any data size."""
    for world_size, samples in ((8, 10**5), (10_000, 10**5), (8, 10**9), (10_000, 10**9)):
        plan = plan_of(world_size, samples, 8 * world_size)
        sampler = Sampler(plan=plan, rank=world_size - 1, train_samples=samples)
        stream = sampler.requests(plan.steps_per_epoch or 0)  # the second epoch
        tracemalloc.start()
        for _ in range(plan.accumulation_steps):
            next(stream)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, (world_size, samples)


def test_a_checkpoint_of_many_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The shards that 256 ranks write, and their parts of replicated tensors, are the model."""
    caplog.set_level(logging.WARNING, "c10d-NullHandler-dcp_logger")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 1500, bias=False), nn.Linear(1500, 2, bias=False))

    original = model()
    extra = {f"buffer/{number}": torch.full((number + 1,), float(number)) for number in range(9)}
    for rank in range(WRITERS):
        with fake_rank(rank):
            sharded = model()
            # torch caches meshes by name, together with the coordinates of the first rank.
            fully_shard(
                sharded, mesh=init_device_mesh("cpu", (WRITERS,), mesh_dim_names=(f"of{rank}",))
            )
            optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
            tensors = [*live_tensors(sharded, optimizer), *extra.items()]
            copies = HostCopies(tensors, rank, WRITERS, HostMemory(is_pinned=False))
            write_shard(tmp_path, rank, copies.tensors)
    manifest = Manifest(
        format=FORMAT,
        step=1,
        samples=1,
        world_size=WRITERS,
        agreement={},
        values={"optimizer": {}, "groups": [], "scaler": None},
        versions={},
    )
    stored = StoredState(Checkpoint(step=1, path=tmp_path), manifest)
    expected = {f"model/{name}": value for name, value in original.state_dict().items()} | extra
    assert set(stored.names()) == set(expected)
    loaded = {name: torch.full_like(value, torch.nan) for name, value in expected.items()}
    stored.read(loaded)
    for name, value in expected.items():
        assert torch.equal(loaded[name], value), name


def test_a_plan_for_ten_thousand_ranks(run: Commands) -> None:
    """The samples per node and per rank in the plan of 1,250 nodes add up to the batch."""
    done = run(
        *("launcher", "plan", "digits", "--nodes", "1250", "-n", "8", "device=cuda", "--json"),
        *("batch_size=100003", "train_samples=1000000000"),
    )
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["samples_per_node"]) == 1250
    assert sum(plan["samples_per_node"]) == sum(plan["samples_per_rank"]) == 100_003
    assert plan["world_size"] == len(plan["samples_per_rank"]) == 10_000
