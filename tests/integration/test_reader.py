"""Reading samples: randomness, fast paths, errors."""

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
from launcher.engine.data.fingerprint import same
from launcher.engine.data.randomness import Generators
from launcher.engine.data.reader import MicroBatch, Reader, checked, sample_count
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.runs.job import RecipeSource
from recipes.digits import digits


def reader(train: Any, **changes: Any) -> Reader:
    """Return a reader of `train`."""
    fields: dict[str, Any] = {
        "name": "some",
        "model": lambda: None,
        "data": lambda: None,
        "loss": lambda *_: None,
        "batch_size": 4,
        "lr": 0.1,
        "steps": 1,
    }
    return Reader(Recipe(**fields | changes), Data(train=train, evaluation=train))


def read(train: Any, *indices: int, epoch: int = 0, **changes: Any) -> MicroBatch:
    """Return the answer to a request for training samples."""
    answer = reader(train, **changes)[request(*indices, epoch=epoch)]
    assert isinstance(answer, MicroBatch)
    return answer


def request(*indices: int, epoch: int = 0, counts: bool = True) -> MicroBatchRequest:
    """Return a request for training samples."""
    return MicroBatchRequest("train", epoch, list(indices), counts)


class Drawn:
    """Samples that are nothing but random numbers, of three generators."""

    def __len__(self) -> int:
        return 100

    def __getitem__(self, index: int) -> Tensor:
        numbers = [index, random.random(), float(np.random.rand()), float(torch.rand(()))]
        return torch.tensor(numbers)


class DrawnTogether(Drawn):
    """The same, also read in batches, from one stream of numbers."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


class ReadTogether(Drawn):
    """Samples without randomness, read in batches."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [torch.tensor(index) for index in indices]

    def __getitem__(self, index: int) -> Tensor:
        raise AssertionError("read in batches")


@pytest.mark.parametrize("train", [Drawn(), DrawnTogether()])
def test_random_numbers_belong_to_the_sample(train: Drawn) -> None:
    """A sample is the same in any micro-batch, and another in another epoch."""
    together = read(train, 3, 4, 5).batch
    assert torch.equal(read(train, 5, 3).batch, together[[2, 0]])
    assert not torch.equal(read(train, 3, epoch=1).batch, together[:1])
    assert len(set(together[:, 1].tolist())) == 3


@pytest.mark.parametrize("train", [Drawn(), DrawnTogether(), ReadTogether()])
def test_reading_leaves_the_generators_alone(train: Drawn) -> None:
    """The model's own random numbers do not depend on what was read in between."""
    before = Generators()
    reader(train)[request(1, 2, 3)]
    assert before.are_untouched()


def test_a_batched_data_set_is_read_in_batches() -> None:
    """__getitems__ is used where it draws nothing."""
    assert read(ReadTogether(), 7, 8).batch.tolist() == [7, 8]


def test_a_tensor_data_set_collates_as_ever() -> None:
    """Slicing a TensorDataset gives what collating its samples would, types included."""
    data = TensorDataset(torch.arange(20).reshape(10, 2), torch.arange(10))
    sliced = read(data, 3, 1).batch
    collated = torch.utils.data.default_collate([data[3], data[1]])
    assert type(sliced) is type(collated)
    assert all(torch.equal(own, other) for own, other in zip(sliced, collated, strict=True))


def test_items_are_counted() -> None:
    """Samples count as items unless the recipe counts otherwise; a ghost counts nothing."""
    data = TensorDataset(torch.arange(10))
    assert read(data, 1, 2).items == 2
    counting = reader(data, count=lambda batch: int(batch[0].sum()))
    for counts, items in ((True, 3), (False, 0)):
        asked = request(1, 2, counts=counts)
        answer = counting[asked]
        assert isinstance(answer, MicroBatch)
        assert (answer.request, answer.counts, answer.items) == (asked, counts, items)


def test_a_failing_sample_is_named() -> None:
    """The error has the sample's number, what was raised, and where."""

    class Broken(Drawn):
        def __getitem__(self, index: int) -> Tensor:
            if index == 4:
                raise OSError("truncated file")
            return torch.zeros(1)

    answer = reader(Broken())[request(3, 4)]
    assert isinstance(answer, SampleError)
    assert "raised OSError for sample 4 (epoch 0): truncated file" in str(answer)
    assert "test_reader.py" in str(answer)


def test_a_failing_collate_names_its_samples() -> None:
    """As a failing sample is named; so does a failing count."""

    def raising(_: Any) -> Any:
        raise KeyError("mask")

    collating = Reader(digits(), Data(train=Drawn(), collate=raising))
    for answer in (collating[request(3, 4)], reader(Drawn(), count=raising)[request(3, 4)]):
        assert isinstance(answer, SampleError)
        assert "raised KeyError for sample 3, 4 (epoch 0)" in str(answer)


def test_a_trial_describes_its_samples() -> None:
    """By their numbers, before they are collated; other requests describe nothing."""
    asked = MicroBatchRequest("train", 0, [7, 2], counts=False, trial=True)
    for data in (TensorDataset(torch.arange(10)), ReadTogether(), [(i,) for i in range(10)]):
        answer = reader(data)[asked]
        assert isinstance(answer, MicroBatch)
        assert answer.samples is not None
        assert list(answer.samples) == ["7", "2"]
        assert answer.samples["7"] != answer.samples["2"]
    assert read(ReadTogether(), 7, 2).samples is None


def test_a_spawned_worker_makes_the_data_anew() -> None:
    """What is sent to it is where the recipe comes from; the samples are the same."""
    source = RecipeSource(recipe=f"{ROOT}/recipes/digits.py:digits")
    recipe = source.build()
    own = Reader(recipe, recipe.data(), source)
    sent = pickle.dumps(own)
    assert len(sent) < 1000
    answers = own[request(3, 4)], pickle.loads(sent)[request(3, 4)]
    assert same(*(checked(answer).batch for answer in answers))


def test_a_spawned_worker_tells_what_it_lacks() -> None:
    """As an answer, because an error while it starts would be a hang or a death."""
    with pytest.raises(RecipeError, match="worker_start=fork"):
        reader(Drawn()).check_start("spawn")
    recipe = digits()
    for location, data, words in (
        (f"{ROOT}/recipes/missing.py:digits", recipe.data(), "missing.py"),
        (f"{ROOT}/recipes/digits.py:digits", Data(train=Drawn()), "100 and 0"),
    ):
        own = Reader(recipe, data, RecipeSource(recipe=location))
        answer = pickle.loads(pickle.dumps(own))[request(1)]
        assert isinstance(answer, RecipeError)
        assert words in str(answer)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([], "is empty"),
        ({"a": [1], "b": [2]}, "keys 'a', 'b'"),
        (iter([1]), "no __getitem__"),
        (None, "NoneType"),
    ],
)
def test_data_that_cannot_be_shared_is_refused(data: Any, message: str) -> None:
    """Empty data and data without a length or index are refused by name."""
    with pytest.raises(RecipeError) as caught:
        sample_count(data, "train")
    assert message in str(caught.value)
