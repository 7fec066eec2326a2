"""Random numbers and BatchNorm statistics that belong to a virtual rank."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from typing import Any

import numpy.random
import pytest
import torch
from examples import LAPTOP, recipe
from torch import Tensor, nn

from launcher import make_plan
from launcher.engine.backends.local import LocalBackend
from launcher.engine.data.randomness import Generators, ModelRandomness
from launcher.engine.data.sampler import Sampler
from launcher.engine.state.module_state import buffers_to_save, read_buffers
from launcher.engine.state.virtual_buffers import VirtualBuffers
from launcher.runs.manifest import StateValues

COUNT = 5


@pytest.fixture(autouse=True)
def _generators() -> Iterator[None]:
    before = Generators()
    yield
    before.restore()


class OneOfMany(LocalBackend):
    """What this process, as one rank of several, knows of itself."""

    def __init__(self, world_size: int, rank: int, **changes: Any) -> None:
        built = recipe(**{"virtual_ranks": COUNT, "device": "cpu"} | changes)
        super().__init__(built, make_plan(built, LAPTOP, nproc_per_node=world_size))
        self.world_size, self.rank = world_size, rank


Drawn = dict[tuple[int, int, int], list[float]]
"""Random numbers by step, virtual rank and micro-step."""


def draw_all(world_size: int, *, first: int = 0, steps: int = 7, draws_from: int = 0) -> Drawn:
    """Return the numbers that a model draws in each micro-batch on all ranks.

    Args:
        world_size: Number of ranks.
        first: The first step, at which all ranks are started.
        steps: The step before which they end.
        draws_from: The first step in which the model draws from `random` and `numpy.random`.
    """
    drawn: Drawn = {}
    for rank in range(world_size):
        backend = OneOfMany(world_size, rank, micro_batch_size=26)
        sampler = Sampler(plan=backend.plan, rank=rank, train_samples=1437)
        random.seed(rank)
        numpy.random.seed(rank)
        randomness = ModelRandomness(backend)
        requests = sampler.requests(first)
        for step in range(first, steps):
            randomness.begin_step(step)
            for _ in range(sampler.micro_steps(step)):
                request = next(requests)
                randomness.begin_part(step, request.part)
                assert request.part is not None
                numbers = [float(torch.rand(()))]
                if step >= draws_from:
                    numbers += [random.random(), numpy.random.random()]
                if request.part.virtual_rank is not None:
                    key = (step, request.part.virtual_rank, request.part.micro_step)
                    drawn[key] = numbers
            randomness.end_step()
    return drawn


@pytest.mark.parametrize("draws_from", [0, 3, 5])
def test_a_virtual_rank_draws_the_same_numbers_on_any_rank(draws_from: int) -> None:
    """The numbers depend on the virtual rank alone, whenever the model draws for the first time."""
    single = draw_all(1, draws_from=draws_from)
    assert len(single) == 6 * COUNT * 2 + COUNT * 2  # micro-batches; the last batch is short
    values = [value for numbers in single.values() for value in numbers]
    assert len(set(values)) == len(values), "no two micro-batches draw the same"
    for world_size in (2, 3, 5):
        assert draw_all(world_size, draws_from=draws_from) == single


def test_a_resumed_run_draws_the_same_numbers() -> None:
    """A run that is started at a later step, on other ranks, draws what it would have drawn."""
    whole = draw_all(2)
    for first in (1, 3):
        resumed = draw_all(3, first=first)
        assert resumed == {key: value for key, value in whole.items() if key[0] >= first}


@pytest.mark.parametrize(
    ("draws_from", "seeded"),
    [(None, {0, 1, 2, 4, 8}), (0, set(range(10))), (3, {0, 1, 2, 4, *range(5, 10)})],
)
def test_generators_of_the_host_are_seeded_once_they_are_used(
    draws_from: int | None, seeded: set[int]
) -> None:
    """Without virtual ranks, `random` is seeded in steps 0, 1, 2, 4, 8, and in all after a draw."""
    randomness = ModelRandomness(OneOfMany(2, 1, virtual_ranks=None))
    found = set()
    for step in range(10):
        random.seed("a state that no seed of a step gives")
        unseeded = random.getstate()
        randomness.begin_step(step)
        randomness.begin_part(step, None)
        if random.getstate() != unseeded:
            found.add(step)
        if draws_from is not None and step >= draws_from:
            random.random()
        randomness.end_step()
    assert found == seeded


class Normed(nn.Module):
    """A model with running statistics of every kind, and a buffer that is none."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.BatchNorm1d(3)
        self.second = nn.InstanceNorm1d(3, track_running_stats=True)
        self.third = nn.BatchNorm1d(3, momentum=None)
        self.untracked = nn.BatchNorm1d(3, track_running_stats=False)
        self.register_buffer("scale", torch.full((3, 1), 2.0))

    def forward(self, x: Tensor) -> Any:
        return self.third(self.second(self.untracked(self.first(x) * self.scale))).sum()


NAMES = {
    f"{module}.{name}"
    for module in ("first", "second", "third")
    for name in ("running_mean", "running_var", "num_batches_tracked")
}


def batch(step: int, virtual_rank: int) -> Tensor:
    """Return the samples of a virtual rank."""
    generator = torch.Generator().manual_seed(100 * step + virtual_rank)
    return torch.randn(4, 3, 6, generator=generator) * (virtual_rank + 1)


def trained(virtual_ranks: range, steps: int = 3) -> tuple[Normed, VirtualBuffers]:
    """Return a model after some steps of some virtual ranks, and their statistics."""
    model = Normed()
    virtual = VirtualBuffers(model, virtual_ranks, COUNT)
    for step in range(steps):
        for virtual_rank in virtual_ranks:
            virtual.select(virtual_rank)
            model(batch(step, virtual_rank))
    return model, virtual


def saved(virtual: Iterable[VirtualBuffers]) -> dict[str, Tensor]:
    """Return what all ranks save."""
    return {name: tensor for own in virtual for name, tensor in own.to_save()}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Check that two dicts have the same names and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def averaged(virtual: list[VirtualBuffers]) -> None:
    """Average the statistics over the ranks, one of which holds each."""
    tables: list[Tensor] = []

    def collect(table: Tensor) -> Tensor:
        tables.append(table)
        return table

    for own in virtual:
        copy.deepcopy(own).average(collect)
    total = torch.stack(tables).sum(0)
    for own in virtual:
        own.average(lambda _: total)


class Saved:
    """A `StateSource` of some tensors."""

    name, steps, has_complete_state = "test", 1, True

    def __init__(self, tensors: dict[str, Tensor], world_size: int) -> None:
        self.tensors, self.world_size = tensors, world_size
        self.values: StateValues = {"optimizer": {}, "groups": [], "scaler": None}

    def names(self) -> list[str]:
        return list(self.tensors)

    def size(self, name: str) -> torch.Size | None:
        return self.tensors[name].shape if name in self.tensors else None

    def dtype(self, name: str) -> torch.dtype:
        return self.tensors[name].dtype

    def read(self, targets: dict[str, Tensor]) -> None:
        for name, target in targets.items():
            target.copy_(self.tensors[name])


SPLITS = [[range(5)], [range(3), range(3, 5)], [range(2), range(2, 4), range(4, 5)]]


def test_each_virtual_rank_has_its_own_statistics() -> None:
    """What a virtual rank has counted does not depend on the rank that computes it."""
    assert trained(range(5))[1].names == NAMES
    reference = saved([trained(range(5))[1]])
    assert len(reference) == COUNT * len(NAMES)
    means = {reference[f"buffer/first.running_mean@v{n}"].sum().item() for n in range(COUNT)}
    assert len(means) == COUNT
    for ranks in SPLITS[1:]:
        assert_equal(saved(trained(own)[1] for own in ranks), reference)


def test_the_average_does_not_depend_on_the_ranks() -> None:
    """Means and variances are averaged to the same bits; counts of batches are kept."""
    results = []
    for ranks in SPLITS:
        models, virtual = zip(*(trained(own) for own in ranks), strict=True)
        averaged(list(virtual))
        results.append(saved(virtual))
        for name, tensor in models[0].named_buffers():
            if name in NAMES:
                assert torch.equal(tensor, results[-1][f"buffer/{name}@v{ranks[0][-1]}"])
    for result in results[1:]:
        assert_equal(result, results[0])
    before = saved([trained(range(5))[1]])
    for name in NAMES:
        copies = [results[0][f"buffer/{name}@v{n}"] for n in range(COUNT)]
        assert all(torch.equal(other, copies[0]) for other in copies)
        if copies[0].is_floating_point():
            mean = torch.stack([before[f"buffer/{name}@v{n}"].double() for n in range(COUNT)])
            torch.testing.assert_close(copies[0], mean.mean(0).float(), rtol=1e-6, atol=1e-7)
        else:
            is_counted = not name.startswith("second")  # torch's InstanceNorm counts no batches
            assert copies[0].item() == 3 * is_counted


@pytest.mark.parametrize("ranks", SPLITS, ids=len)
def test_statistics_are_read_on_any_number_of_ranks(ranks: list[range]) -> None:
    """Statistics that three ranks have saved are read by one, two or three, to the bit."""
    sources = [trained(own) for own in SPLITS[2]]
    model = sources[0][0]
    shared = buffers_to_save(model, 0, lambda value: [value], without=sources[0][1].names)
    assert list(shared) == ["buffer/scale"]
    source = Saved(shared | saved(virtual for _, virtual in sources), 3)
    read = []
    for rank, own in enumerate(ranks):
        model = Normed()
        virtual = VirtualBuffers(model, own, COUNT)
        read_buffers(model, source, rank, len(ranks), torch.device("cpu"))
        virtual.read(source)
        read.append(virtual)
        first = dict(model.named_buffers())["first.running_mean"]
        assert torch.equal(first, source.tensors[f"buffer/first.running_mean@v{own[0]}"])
    assert_equal(saved(read), saved(virtual for _, virtual in sources))


def test_a_checkpoint_without_virtual_ranks_fills_all_of_them() -> None:
    """Every virtual rank starts from the statistics of a run without virtual ranks."""
    plain = Normed()
    plain(batch(0, 0))
    source = Saved(buffers_to_save(plain, 0, lambda value: [value]), 1)
    model = Normed()
    virtual = VirtualBuffers(model, range(2, 4), COUNT)
    read_buffers(model, source, 1, 2, torch.device("cpu"))
    virtual.read(source)
    for name in NAMES:
        for virtual_rank in (2, 3):
            saved_copy = dict(virtual.to_save())[f"buffer/{name}@v{virtual_rank}"]
            assert torch.equal(saved_copy, source.tensors[f"buffer/{name}"])


def test_a_run_without_virtual_ranks_reads_their_mean() -> None:
    """A model without virtual ranks takes the mean of their statistics."""
    virtual = trained(range(5))[1]
    shared = buffers_to_save(Normed(), 0, lambda value: [value], without=virtual.names)
    source = Saved(shared | saved([virtual]), 2)
    model = Normed()
    read_buffers(model, source, 0, 1, torch.device("cpu"))
    copies = [source.tensors[f"buffer/first.running_mean@v{n}"].double() for n in range(COUNT)]
    mean = model.first.running_mean
    assert mean is not None
    torch.testing.assert_close(mean, torch.stack(copies).mean(0).float())
