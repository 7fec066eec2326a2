"""Tests of the reader: random state, fast paths and errors."""

from __future__ import annotations

import pickle
import random
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from torch import Tensor
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, RecipeError, SampleError
from launcher.engine.data.fingerprint import are_equal
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.prefetching import raise_if_error
from launcher.engine.data.randomness import Generators
from launcher.engine.data.reader import Reader
from launcher.engine.data.recipe_data import sample_count
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.runs.job import RecipeSource
from recipes.digits import digits


def reader(train: Any, *, collate: Any = None, **changes: Any) -> Reader:
    """Return a reader of the data set `train`, for a recipe with the fields in `changes`."""
    fields: dict[str, Any] = {
        "name": "some",
        "model": lambda: None,
        "data": lambda: None,
        "loss": lambda *_: None,
        "batch_size": 4,
        "lr": 0.1,
        "steps": 1,
    }
    return Reader(Recipe(**fields | changes), Data(train=train, evaluation=train, collate=collate))


def read(train: Any, *indices: int, epoch: int = 0, **changes: Any) -> MicroBatch:
    """Return the micro-batch of the training samples with `indices`."""
    micro_batch = reader(train, **changes)[request(*indices, epoch=epoch)]
    assert isinstance(micro_batch, MicroBatch)
    return micro_batch


def request(*indices: int, epoch: int = 0, counts: bool = True) -> MicroBatchRequest:
    """Return a request for training samples."""
    return MicroBatchRequest("train", epoch, list(indices), counts)


class Drawn:
    """Samples of random numbers from the three global generators."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Tensor:
        numbers = [index, random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor(numbers)


class DrawnTogether(Drawn):
    """Random samples whose `__getitems__` draws from one stream for the whole batch."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


class ReadTogether(Drawn):
    """Samples without randomness that can be read only by `__getitems__`."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(index) for index in indices]

    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("read in batches")


@pytest.mark.parametrize("train", [Drawn(), DrawnTogether()])
def test_random_numbers_depend_on_sample_and_epoch_alone(train: Drawn) -> None:
    """A sample draws the same numbers in any micro-batch, and others in another epoch."""
    batch = read(train, 3, 4, 5).batch
    assert torch.equal(read(train, 5, 3).batch, batch[[2, 0]])
    assert not torch.equal(read(train, 3, epoch=1).batch, batch[:1])
    assert len(set(batch[:, 1].tolist())) == 3


@pytest.mark.parametrize("train", [Drawn(), DrawnTogether(), ReadTogether()])
def test_reading_restores_the_global_generators(train: Drawn) -> None:
    """Reading samples does not change the state of the global generators."""
    generators = Generators()
    reader(train)[request(1, 2, 3)]
    assert generators.are_untouched()


def test_what_a_collate_function_draws_depends_on_epoch_and_samples_alone() -> None:
    """A batch is the same whatever was drawn before it, and its draws change no generator."""

    def mix(samples: list[Tensor]) -> Tensor:
        share = random.random() + float(np.random.rand()) + float(torch.rand(()))
        return torch.stack(samples) * share

    data, batches = reader(torch.ones(100), collate=mix), []
    for indices, epoch in (((3, 4), 0), ((3, 4), 0), ((4, 3), 0), ((3, 4), 1)):
        random.seed(), np.random.seed(), torch.seed()
        before = Generators()
        micro_batch = data[request(*indices, epoch=epoch)]
        assert isinstance(micro_batch, MicroBatch)
        assert before.are_untouched()
        batches.append(micro_batch.batch.tolist())
    assert batches[0] == batches[1]
    assert len({first for first, _ in batches}) == 3


def test_a_batched_data_set_is_read_in_batches() -> None:
    """`__getitems__` is used if it draws no random numbers."""
    assert read(ReadTogether(), 7, 8).batch.tolist() == [7, 8]


def test_a_tensor_data_set_is_sliced_as_it_would_be_collated() -> None:
    """Slicing a TensorDataset gives the tensors and types of collating its samples."""
    data = TensorDataset(torch.arange(20).reshape(10, 2), torch.arange(10))
    sliced = read(data, 3, 1).batch
    collated = torch.utils.data.default_collate([data[3], data[1]])
    assert type(sliced) is type(collated)
    assert all(torch.equal(one, other) for one, other in zip(sliced, collated, strict=True))


def test_items_are_counted() -> None:
    """Items are samples, or what the recipe counts; a micro-batch of weight 0 has none."""
    data = TensorDataset(torch.arange(10))
    assert read(data, 1, 2).items == 2
    counting_reader = reader(data, count=lambda batch: int(batch[0].sum()))
    for counts, items in ((True, 3), (False, 0)):
        counting_request = request(1, 2, counts=counts)
        micro_batch = counting_reader[counting_request]
        assert isinstance(micro_batch, MicroBatch)
        assert micro_batch.request == counting_request
        assert (micro_batch.has_weight, micro_batch.items) == (counts, items)


def test_a_failing_sample_is_named() -> None:
    """An exception in a data set is reported with the sample, the exception and its traceback."""

    class Broken(Drawn):
        def __getitem__(self, index: int) -> Tensor:
            if index == 4:
                raise OSError("truncated file")
            return torch.zeros(1)

    result = reader(Broken())[request(3, 4)]
    assert isinstance(result, SampleError)
    assert "raised OSError for sample 4 (epoch 0): truncated file" in str(result)
    assert "test_reader.py" in str(result)


def test_a_failing_collate_names_its_samples() -> None:
    """Exceptions in the collate and count functions are reported with the samples."""

    def fail(_: Any) -> Any:
        raise KeyError("mask")

    collating_reader = Reader(digits(), Data(train=Drawn(), collate=fail))
    for result in (collating_reader[request(3, 4)], reader(Drawn(), count=fail)[request(3, 4)]):
        assert isinstance(result, SampleError)
        assert "raised KeyError for samples 3, 4 (epoch 0)" in str(result)


def test_samples_that_cannot_be_joined_are_named() -> None:
    """Without a collate function, the error names two different samples and their shapes."""
    result = reader([(torch.ones(4 + i % 2), i) for i in range(8)])[request(6, 2, 3)]
    assert isinstance(result, SampleError)
    for fragment in ("Sample 6", "(4,)", "sample 3", "(5,)", "Data(collate=...)"):
        assert fragment in str(result)


def test_a_trial_describes_its_samples() -> None:
    """A trial request describes each sample by its index; other requests describe none."""
    trial = MicroBatchRequest("train", 0, [7, 2], has_weight=False, trial=True)
    for data in (TensorDataset(torch.arange(10)), ReadTogether(), [(i,) for i in range(10)]):
        micro_batch = reader(data)[trial]
        assert isinstance(micro_batch, MicroBatch)
        assert micro_batch.samples is not None
        assert list(micro_batch.samples) == ["7", "2"]
        assert micro_batch.samples["7"] != micro_batch.samples["2"]
    assert read(ReadTogether(), 7, 2).samples is None


def test_a_spawned_worker_creates_the_data_itself() -> None:
    """A pickled reader contains only the recipe's location, and reads the same samples."""
    source = RecipeSource(recipe=f"{ROOT}/recipes/digits.py:digits")
    recipe = source.build()
    rank_reader = Reader(recipe, recipe.data(), source)
    pickled = pickle.dumps(rank_reader)
    assert len(pickled) < 1000
    results = rank_reader[request(3, 4)], pickle.loads(pickled)[request(3, 4)]
    assert are_equal(*(raise_if_error(result).batch for result in results))


def test_a_spawned_worker_returns_errors_of_the_data_function() -> None:
    """A reader that cannot create its data returns the error, so that the worker survives."""
    with pytest.raises(RecipeError, match="worker_start=fork"):
        reader(Drawn()).check_start("spawn")
    recipe = digits()
    for location, data, fragment in (
        (f"{ROOT}/recipes/missing.py:digits", recipe.data(), "missing.py"),
        (f"{ROOT}/recipes/digits.py:digits", Data(train=Drawn()), "but 100 train samples"),
    ):
        rank_reader = Reader(recipe, data, RecipeSource(recipe=location))
        result = pickle.loads(pickle.dumps(rank_reader))[request(1)]
        assert isinstance(result, RecipeError)
        assert fragment in str(result)


@pytest.mark.parametrize(
    ("data", "fragment"),
    [
        ([], "empty"),
        ({"a": [1], "b": [2]}, "'a', 'b'"),
        (iter([1]), "__getitem__"),
        (None, "NoneType"),
    ],
)
def test_data_that_cannot_be_divided_is_refused(data: Any, fragment: str) -> None:
    """Empty data and data without a length or an index raise RecipeError with the cause."""
    with pytest.raises(RecipeError) as caught:
        sample_count(data, "train")
    assert fragment in str(caught.value)
