"""Tests of batches of any structure: pinned, sent by workers and placed as they are."""

from __future__ import annotations

import types
from collections import OrderedDict, UserDict, deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from launcher import Data, Recipe
from launcher.engine.backends.nested_tensors import describe_nested, map_tensors, tensors_in
from launcher.engine.backends.placement import Placement
from launcher.engine.data import prefetching
from launcher.engine.data.prefetching import pinned, prefetch, raise_if_error
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest


class Pair(NamedTuple):
    """Inputs and targets."""

    inputs: Any
    targets: Any


@dataclass(frozen=True)
class Frozen:
    """A batch that cannot be changed."""

    inputs: Any
    pair: Pair
    name: str = "some"


@dataclass(slots=True)
class Slotted:
    """A batch without a dict."""

    inputs: Any


def ragged(numbers: list[Any]) -> Tensor:
    """Return a jagged tensor whose rows have 1, 2, ... elements."""
    rows = [torch.ones(1 + index) * number for index, number in enumerate(numbers)]
    return torch.nested.nested_tensor(rows, layout=torch.jagged)


def column(numbers: list[Any]) -> Tensor:
    """Return numbers as a tensor."""
    return torch.tensor([float(number) for number in numbers])


COLLATES: dict[str, Any] = {
    "named tuple": lambda numbers: Pair(column(numbers), [column(numbers)]),
    "frozen dataclass": lambda numbers: Frozen(column(numbers), Pair(column(numbers), 3)),
    "slotted dataclass": lambda numbers: Slotted({"x": column(numbers)}),
    "user dict": lambda numbers: UserDict({"ids": column(numbers), "n": 3}),
    "ordered dict": lambda numbers: OrderedDict(b=column(numbers), a=column(numbers)),
    "proxy": lambda numbers: types.MappingProxyType({"ids": column(numbers)}),
    "deque": lambda numbers: deque([column(numbers)], maxlen=2),
    "ragged": lambda numbers: {"rows": ragged(numbers), "x": column(numbers)},
    "nested": lambda numbers: [({"x": (column(numbers), Slotted(column(numbers)))}, "text")],
}


def reader(collate: Any) -> Reader:
    """Return a reader of the numbers from 0 to 7."""
    made = Recipe(
        name="some", model=lambda: None, data=lambda: Data(train=0), loss=lambda *_: (0, 1),
        batch_size=4, lr=0.1, steps=1,
    )  # fmt: skip
    return Reader(made, Data(train=list(range(8)), collate=collate))


@pytest.mark.parametrize("kind", [kind for kind in COLLATES if kind != "proxy"])
def test_a_worker_sends_any_batch(kind: str) -> None:
    """Batches of any structure arrive from a worker with their types and values."""
    requests = [
        MicroBatchRequest("train", 0, [4 * step + n for n in range(4)], True) for step in (0, 1)
    ]
    read = reader(COLLATES[kind])
    received = prefetch(read, requests, workers=1, method="fork")
    for request, result in zip(requests, received, strict=True):
        batch, expected = raise_if_error(result).batch, raise_if_error(read[request]).batch
        assert type(batch) is type(expected)
        assert describe_nested(batch) == describe_nested(expected)
        for one, other in zip(flat(batch), flat(expected), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kind", list(COLLATES))
def test_every_tensor_is_pinned_and_placed(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinning reaches every tensor, offsets of ragged ones too, and so does the copy."""
    batch = COLLATES[kind]([0, 1, 2, 3])
    seen: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    micro_batch = raise_if_error(reader(COLLATES[kind])[MicroBatchRequest("train", 0, [0], True)])
    result = pinned(micro_batch._replace(batch=batch)).batch
    assert type(result) is type(batch)
    assert len(seen) == len(flat(batch))
    placed = Placement(torch.device("meta")).copy(batch)
    assert type(placed) is type(batch)
    assert {tensor.device.type for tensor in tensors_in(placed)} == {"meta"}
    assert len(tensors_in(placed)) == len(tensors_in(batch))


def test_a_micro_batch_on_its_way_pins_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread of torch that pins the batches of workers reaches what is in a dataclass."""
    counted: list[Tensor] = []

    def pin(tensor: Tensor) -> Tensor:
        counted.append(tensor)
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    micro_batch = raise_if_error(
        reader(COLLATES["frozen dataclass"])[MicroBatchRequest("train", 0, [0, 1], True)]
    )
    pin_memory: Any = torch.utils.data._utils.pin_memory.pin_memory
    pin_memory(prefetching._send(micro_batch))
    assert len(counted) == 2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_ragged_tensors_are_described_and_converted() -> None:
    """A ragged tensor has a star for its ragged dimension, and fp64 converts it."""
    jagged = ragged([1, 2, 3])
    assert describe_nested(jagged) == "float32 (3, *)"
    rows = [torch.ones(1, 2), torch.ones(3, 2)]
    assert describe_nested(torch.nested.nested_tensor(rows)) == "float32 (2, *, 2)"
    converted = Placement(torch.device("cpu"), double=True, channels_last=True).copy([jagged])
    assert converted[0].dtype == torch.float64
    assert map_tensors(lambda tensor: tensor.is_nested, [jagged]) == [True]


def flat(batch: Any) -> list[Tensor]:
    """Return the dense tensors in a batch; of a ragged one, its values and offsets."""
    tensors: list[Tensor] = []
    tensor: Any
    for tensor in tensors_in(batch):
        tensors += [tensor.values(), tensor.offsets()] if tensor.is_nested else [tensor]
    return tensors
