"""A thousand ranks in one process, and ten thousand on paper: what each does, and what it costs."""

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
from launcher.engine.data.sampler import Sampler
from launcher.engine.saving.checkpoint_tensors import StoredState, write_shard
from launcher.engine.state.training_state import keep, live_tensors
from launcher.recipes.digits import digits
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.manifest import FORMAT, Manifest

RANKS = 1024


def planned(world_size: int, samples: int, batch_size: int) -> Plan:
    """Return a plan of CPU ranks, eight on each node."""
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
    """Be one of many ranks, in a process group whose collectives do nothing."""
    dist.init_process_group("fake", rank=rank, world_size=RANKS, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def test_every_sample_once_and_weights_of_one() -> None:
    """Over 1,024 ranks the steps of an epoch take each sample once, and weigh each the same."""
    samples, batch = 30_011, 6_001
    plan = planned(RANKS, samples, batch)
    ranks = [
        Sampler(plan=plan, rank=rank, train_samples=samples, evaluation_samples=4_099)
        for rank in range(RANKS)
    ]
    assert plan.steps_per_epoch == 6
    streams = [sampler.requests() for sampler in ranks]
    seen: list[int] = []
    for step in range(6):
        size, micro_steps = ranks[0].window(step).size, ranks[0].micro_steps(step)
        taken: list[int] = []
        weight = Fraction(0)
        for stream in streams:
            for _ in range(micro_steps):
                request = next(stream)
                assert request.split == "train"
                if request.counts:
                    taken += request.indices
                    # Of the mean over ranks of (sum of losses) x world size / samples.
                    weight += Fraction(len(request.indices) * RANKS, size) / RANKS
        assert taken == ranks[0].batch_ids(step)
        assert weight == 1
        seen += taken
    assert sorted(seen) == list(range(samples))
    evaluated = [
        index
        for stream in streams
        for _ in range(ranks[0].evaluation_steps())
        for request in [next(stream)]
        if request.counts
        for index in request.indices
    ]
    assert sorted(evaluated) == list(range(4_099))


def test_the_last_batch_leaves_no_rank_alone() -> None:
    """Where a batch has fewer samples than ranks, each still takes part, with weight 0."""
    plan = planned(RANKS, 6_100, 6_000)
    taken = 0
    for rank in range(RANKS):
        sampler = Sampler(plan=plan, rank=rank, train_samples=6_100)
        own = [next(sampler.requests(1)) for _ in range(sampler.micro_steps(1))]
        assert len(own) == 1
        assert own[0].indices
        taken += own[0].counts
    assert taken == 100


def test_a_rank_costs_the_same_in_any_world() -> None:
    """A step's samples take little memory, whatever the ranks and the data's size."""
    for world_size, samples in ((8, 10**5), (10_000, 10**5), (8, 10**9), (10_000, 10**9)):
        plan = planned(world_size, samples, 8 * world_size)
        sampler = Sampler(plan=plan, rank=world_size - 1, train_samples=samples)
        stream = sampler.requests(plan.steps_per_epoch or 0)  # the second epoch
        tracemalloc.start()
        for _ in range(plan.accumulation_steps):
            next(stream)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1 << 20, (world_size, samples)


def test_a_checkpoint_of_a_thousand_ranks(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each rank writes its shards, and its share of what all have; together they are the model."""
    caplog.set_level(logging.WARNING, "c10d-NullHandler-dcp_logger")

    def model() -> nn.Module:
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(3, 1500, bias=False), nn.Linear(1500, 2, bias=False))

    whole = model()
    extra = {f"buffer/{number}": torch.full((number + 1,), float(number)) for number in range(9)}
    for rank in range(RANKS):
        with fake_rank(rank):
            sharded = model()
            # torch takes meshes of one name for the same, with the place of the first in it.
            fully_shard(
                sharded, mesh=init_device_mesh("cpu", (RANKS,), mesh_dim_names=(f"of{rank}",))
            )
            optimizer = torch.optim.SGD(sharded.parameters(), lr=0.1)
            own = keep([*live_tensors(sharded, optimizer), *extra.items()], rank, RANKS)
            write_shard(tmp_path, rank, own)
    manifest = Manifest(
        format=FORMAT,
        step=1,
        samples=1,
        world_size=RANKS,
        agreement={},
        values={"optimizer": {}, "groups": [], "scaler": None},
        versions={},
    )
    stored = StoredState(Checkpoint(step=1, path=tmp_path), manifest)
    wanted = {f"model/{name}": value for name, value in whole.state_dict().items()} | extra
    assert set(stored.names()) == set(wanted)
    found = {name: torch.full_like(value, torch.nan) for name, value in wanted.items()}
    stored.read(found)
    for name, value in wanted.items():
        assert torch.equal(found[name], value), name


def test_ten_thousand_ranks_on_paper(run: Commands) -> None:
    """The plan of 1,250 nodes has a number for each node, and they add up."""
    done = run(
        *("launcher", "plan", "digits", "--nodes", "1250", "-n", "8", "device=cuda", "--json"),
        *("batch_size=100003", "train_samples=1000000000"),
    )
    assert done.exit_code == 0, done.stderr
    plan = json.loads(done.stdout)
    assert len(plan["samples_per_node"]) == 1250
    assert sum(plan["samples_per_node"]) == sum(plan["samples_per_rank"]) == 100_003
    assert plan["world_size"] == len(plan["samples_per_rank"]) == 10_000
