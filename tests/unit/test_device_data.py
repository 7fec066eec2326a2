"""Tests of data that lies on the device: batches by index, counts, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from examples import LAPTOP, recipe
from torch.utils.data import TensorDataset

from launcher import Data, PlanError, RecipeError, make_plan
from launcher.engine.data.device_data import DeviceData
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest

CPU = torch.device("cpu")
NUMBERS = TensorDataset(torch.arange(20.0).reshape(10, 2), torch.arange(10))


def read(reader: Reader, split: str = "train") -> MicroBatch:
    """Return the micro-batch of samples 3 and 1."""
    micro_batch = reader[MicroBatchRequest(split, 0, [3, 1], has_weight=True)]
    assert isinstance(micro_batch, MicroBatch)
    return micro_batch


def test_batches_are_those_of_the_host() -> None:
    """A reader makes the same batches, and counts the same items, from tensors on the device."""
    data = Data(train=NUMBERS, evaluation={"dev": NUMBERS, "list": [(1, 2)] * 4})
    counted = recipe(data_on_device=True, count=lambda batch: int(batch[1].sum()))
    on_device = Reader(counted, data, device=CPU)
    on_host = Reader(replace(counted, data_on_device=False), data, device=CPU)
    for split in ("train", "evaluation/dev", "evaluation/list"):
        one, other = read(on_device, split), read(on_host, split)
        assert type(one.batch) is type(other.batch)
        assert all(torch.equal(a, b) for a, b in zip(one.batch, other.batch, strict=True))
        assert one.items == other.items


@pytest.mark.parametrize(
    ("train", "collate", "found"),
    [
        ([1, 2, 3], None, "list"),
        (NUMBERS, lambda samples: samples, "collate"),
        (torch.utils.data.Subset(NUMBERS, [0]), None, "Subset"),
        (TensorDataset(torch.eye(4).to_sparse()), None, "sparse_coo"),
    ],
)
def test_other_data_is_refused(train: Any, collate: Any, found: str) -> None:
    """Only tensors without a collate function lie on the device; the error names what was found."""
    with pytest.raises(RecipeError, match=found):
        DeviceData(Data(train=train, collate=collate), CPU)


def test_workers_are_refused() -> None:
    """A plan refuses DataLoader workers for data on the device, and has none by default."""
    with pytest.raises(PlanError, match="num_workers=2"):
        make_plan(recipe(data_on_device=True, num_workers=2), LAPTOP)
    assert make_plan(recipe(data_on_device=True), LAPTOP).workers_per_rank == 0
