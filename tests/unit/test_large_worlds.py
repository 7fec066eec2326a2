"""What a rank computes from its number in worlds of 8 and of 512 ranks."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_ranks import fake_rank, large_plan
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.nn import functional

from launcher import Data, Recipe, adamw
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.engine.model.blocks import find_blocks
from launcher.engine.model.deferred import defer
from launcher.engine.saving.checkpoint_tensors import _Reader, write_shard
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.host_copies import HostCopies, HostMemory
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.state.initial_values import parts_of

# Timeouts can be set for gloo and NCCL; the fake group has none.
pytestmark = pytest.mark.filterwarnings("ignore:Set timeout is now only supported")

WORLDS = (8, 512)
PLACES = [(world, rank) for world in WORLDS for rank in (0, world // 2, world - 1)]
SAMPLES, BATCH_SIZE, EVALUATION_SAMPLES = 10_000, 1001, 777
WIDTH = 30


class Block(nn.Module):
    """A layer with a bottleneck, whose weights have 30 and 1,000 rows."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow, self.wide = nn.Linear(1000, WIDTH), nn.Linear(WIDTH, 1000)

    def forward(self, x: Tensor) -> Tensor:
        """Return the input with something added."""
        out: Tensor = x + self.wide(self.narrow(x))
        return out


def make_model() -> nn.Module:
    """Return a model of three blocks between two layers, on the CPU."""
    return nn.Sequential(
        nn.Linear(6, 1000), nn.Sequential(Block(), Block(), Block()), nn.Linear(1000, 1)
    )


def make_recipe(strategy: str) -> Recipe:
    """Return a recipe whose batch no power of two divides."""
    fields: dict[str, Any] = {
        "name": "large",
        "model": make_model,
        "data": lambda: Data(train=[]),
        "loss": lambda outputs, batch: (outputs.sum(), len(batch)),
        "batch_size": BATCH_SIZE,
        "lr": 0.1,
        "lr_batch_size": BATCH_SIZE,
        "epochs": 2,
        "train_samples": SAMPLES,
        "optimizer": adamw(),
        "device": "cpu",
        "strategy": strategy,
        "shard": "all" if strategy == "fsdp" else "node",
    }
    return Recipe(**fields)


def rows_of(size: int, world_size: int, rank: int) -> tuple[int, int]:
    """Return the first row of a rank's shard, and the number of its rows."""
    per_rank = -(-size // world_size)
    start = min(rank * per_rank, size)
    return start, min(per_rank, size - start)


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_ranks_share_every_batch(world_size: int) -> None:
    """The shares have equal sizes up to one sample, and hold every sample of the batch once."""
    plan = large_plan(make_recipe("ddp"), world_size)
    assert (plan.batch_size, plan.total_steps, plan.lr) == (BATCH_SIZE, 20, 0.1)
    samplers = [Sampler(plan=plan, rank=rank, train_samples=SAMPLES) for rank in range(world_size)]
    for step in (0, 9):  # a whole batch, and the shorter one at the end of the epoch
        window = samplers[0].window(step)
        assert window.size == (BATCH_SIZE if step == 0 else SAMPLES - 9 * BATCH_SIZE)
        num_micro_steps = {sampler.micro_steps(step) for sampler in samplers}
        assert len(num_micro_steps) == 1
        shares = [
            [
                index
                for request in itertools.islice(sampler.requests(step), *num_micro_steps)
                if request.has_weight
                for index in request.indices
            ]
            for sampler in samplers
        ]
        sizes = set(map(len, shares))
        assert sizes <= {window.size // world_size, window.size // world_size + 1}
        taken = Counter(itertools.chain.from_iterable(shares))
        assert taken == dict.fromkeys(samplers[0].batch_ids(step), 1)


@pytest.mark.parametrize("world_size", WORLDS)
def test_the_ranks_share_an_evaluation(world_size: int) -> None:
    """Every sample is evaluated by one rank, and all ranks make the same number of requests."""
    plan = large_plan(make_recipe("ddp"), world_size)
    requests = [
        list(
            Sampler(
                plan=plan,
                rank=rank,
                train_samples=SAMPLES,
                evaluations=(EvaluationSchedule(samples=EVALUATION_SAMPLES),),
            ).evaluation()
        )
        for rank in range(world_size)
    ]
    assert len(set(map(len, requests))) == 1
    counts = Counter(
        index
        for of_rank in requests
        for request in of_rank
        if request.has_weight
        for index in request.indices
    )
    assert counts == dict.fromkeys(range(EVALUATION_SAMPLES), 1)


@pytest.mark.parametrize(("world_size", "rank"), PLACES)
def test_fsdp_gives_each_rank_its_rows(world_size: int, rank: int) -> None:
    """Weights, gradients and optimizer state of a rank are the rows of its shard, maybe none."""
    recipe = make_recipe("fsdp")
    with fake_rank(recipe, world_size, rank) as backend:
        model = make_model()
        blocks = find_blocks(model, None)
        wrapped, optimizer = backend.prepare(
            model, blocks, lambda module: make_optimizer(recipe, module, 0.1)
        )
        units = [module for module in wrapped.modules() if isinstance(module, FSDPModule)]
        assert len(blocks) == 3
        assert units[1:] == blocks, "the root and each block are gathered on their own"
        assert backend.world_size == world_size
        outputs = wrapped(lambda: model(torch.ones(2, 6)))
        backend.backward(functional.mse_loss(outputs, torch.zeros(2, 1)), 1.0)
        backend.unwrap(wrapped)
        for parameter in model.parameters():
            assert isinstance(parameter, DTensor)
            size = parameter.shape[0]
            start, num_rows = rows_of(size, world_size, rank)
            assert parameter.device_mesh.size() == world_size
            assert parameter.to_local().shape == (num_rows, *parameter.shape[1:])
            shape, offset = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            assert shape == parameter.to_local().shape
            assert not num_rows or offset[0] == start
            assert isinstance(parameter.grad, DTensor)
            assert parameter.grad.to_local().shape == parameter.to_local().shape
            parameter.grad = torch.zeros_like(parameter)
        backend.apply(optimizer, None)
        for parameter in model.parameters():
            average = optimizer.state[parameter]["exp_avg"]
            assert average.to_local().shape == parameter.to_local().shape  # type: ignore[attr-defined]
        assert len(dict(model.named_parameters())) == 16


@pytest.mark.parametrize(("world_size", "rank"), PLACES)
def test_a_shard_records_its_place(tmp_path: Path, world_size: int, rank: int) -> None:
    """The files of a rank's checkpoint have the offsets and the sizes of its shards."""
    recipe = make_recipe("fsdp")
    with fake_rank(recipe, world_size, rank) as backend:
        model = make_model()
        wrapped, optimizer = backend.prepare(
            model, find_blocks(model, None), lambda module: make_optimizer(recipe, module, 0.1)
        )
        state = backend.snapshot(wrapped, optimizer)
        write_shard(tmp_path, rank, state.tensors)
    stored = _Reader(str(tmp_path)).read_metadata().state_dict_metadata
    expected = {name: tensor.shape for name, tensor in make_model().named_parameters()}
    for name, shape in expected.items():
        start, num_rows = rows_of(shape[0], world_size, rank)
        metadata: Any = stored.get(f"model/{name}")
        if not num_rows:
            assert metadata is None or not metadata.chunks or not metadata.chunks[0].sizes.numel()
            continue
        [chunk] = metadata.chunks
        assert chunk.sizes == (num_rows, *shape[1:])
        assert chunk.offsets == (start, *[0] * (len(shape) - 1))


def _copies(tensors: list[tuple[str, Tensor]], rank: int, world_size: int) -> dict[str, Any]:
    return HostCopies(tensors, rank, world_size, HostMemory(is_pinned=False)).tensors


@pytest.mark.parametrize("world_size", WORLDS)
def test_full_tensors_of_a_checkpoint_are_divided(world_size: int) -> None:
    """Each full tensor is written by one rank, and no rank writes much more than another."""
    tensors = [(f"model/{n}", torch.zeros(1 + 37 * n % 101, 8)) for n in range(4 * world_size)]
    parts = [_copies(tensors, rank, world_size) for rank in range(world_size)]
    assert sorted(name for part in parts for name in part) == sorted(dict(tensors))
    num_bytes = [sum(tensor.nbytes for tensor in part.values()) for part in parts]
    assert max(num_bytes) - min(num_bytes) <= max(tensor.nbytes for _, tensor in tensors)


@pytest.mark.parametrize(("world_size", "rank"), PLACES)
def test_gathered_weights_are_given_back(world_size: int, rank: int) -> None:
    """After an evaluation the blocks hold shards at once, and the root after `unwrap`."""
    recipe = make_recipe("fsdp")
    with fake_rank(recipe, world_size, rank) as backend:
        model = make_model()
        blocks = find_blocks(model, None)
        wrapped, _ = backend.prepare(
            model, blocks, lambda module: make_optimizer(recipe, module, 0.1)
        )
        with torch.no_grad():
            wrapped(lambda: model(torch.ones(2, 6)))
        sharded = {id(p) for p in model.parameters() if isinstance(p, DTensor)}
        # Some versions of Accelerate let the root give its own weights back at once as well.
        assert sharded >= {id(p) for block in blocks for p in block.parameters()}
        backend.unwrap(wrapped)
        assert all(isinstance(parameter, DTensor) for parameter in model.parameters())


@pytest.mark.parametrize(("world_size", "rank"), PLACES)
def test_fsdp_keeps_what_it_shards(world_size: int, rank: int) -> None:
    """The boxes that a rank keeps of a model with values are those of its shards."""
    recipe = make_recipe("fsdp")
    with fake_rank(recipe, world_size, rank) as backend:
        torch.manual_seed(1)
        whole = dict(make_model().named_parameters())
        torch.manual_seed(1)
        model, values = defer(make_model)
        backend.prepare(
            model,
            find_blocks(model, None),
            lambda module: make_optimizer(recipe, module, 0.1),
            values,
        )
        for name, part in parts_of(model).items():
            [kept] = backend.own_boxes(part.size)
            assert [box.slices for box, _ in part.pieces] == [kept.slices] * bool(kept.sizes[0])
            for box, memory in part.pieces:
                assert torch.equal(memory, whole[plain_name(name)][box.slices])
