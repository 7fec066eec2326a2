"""The GPU of a rank, without a GPU."""

from __future__ import annotations

import os
from collections import UserDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch._C._distributed_c10d import HashStore

from launcher.engine.backends import placement
from launcher.engine.backends.devices import (
    check_own_device,
    device_index,
    set_tf32,
    use_deterministic_kernels,
)
from launcher.engine.backends.placement import Placement, RunAhead, move_object
from launcher.environment.machine import read_machine
from launcher.environment.world import World
from launcher.errors import RecipeError, WorldError
from launcher.recipe.resolve import resolve
from launcher.runs.plan_recipe import plan_recipe


@pytest.mark.parametrize(
    ("local_rank", "num_visible", "index"), [(0, 4, 0), (3, 4, 3), (0, 1, 0), (3, 1, 0)]
)
def test_the_index_of_a_gpu(local_rank: int, num_visible: int, index: int) -> None:
    """A rank takes the GPU of its own number, or the only one that it can see."""
    _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=4)
    assert device_index(local_rank, num_visible, plan) == index


def test_too_few_gpus_are_refused() -> None:
    """A rank without a GPU is refused with the number that there are."""
    _, plan = plan_recipe(resolve("digits"), (), read_machine(), nproc_per_node=4)
    with pytest.raises(WorldError, match=r"4 GPUs.*finds 2"):
        device_index(3, 2, plan)


@pytest.mark.parametrize("uuids", [("a", "b", "c", "a"), ("a", "b", "c", "d", "a", "b", "b", "d")])
def test_two_ranks_on_one_gpu_are_refused(uuids: tuple[str, ...]) -> None:
    """Only ranks of the same node that have the same GPU are refused, with both numbers."""
    store = HashStore()

    def check(rank: int) -> str:
        world = World(rank=rank, world_size=len(uuids), local_rank=rank % 4, local_world_size=4)
        try:
            check_own_device(store, world, uuids[rank])
        except WorldError as error:
            return str(error)
        return ""

    with ThreadPoolExecutor(len(uuids)) as pool:
        errors = list(pool.map(check, range(len(uuids))))
    refused = [rank for rank, error in enumerate(errors) if error]
    assert refused == ([0, 3] if len(uuids) == 4 else [5, 6])
    assert all(f"Ranks {refused[0]} and {refused[1]} " in errors[rank] for rank in refused)


@pytest.mark.parametrize("enabled", [True, False])
def test_tf32_is_the_same_in_both_spellings(*, enabled: bool) -> None:
    """The old and the new settings of torch agree, and neither raises when it is read."""
    matmul: Any = torch.backends.cuda.matmul
    convolution: Any = torch.backends.cudnn
    before = matmul.allow_tf32, convolution.allow_tf32
    try:
        set_tf32(enabled=enabled)
        assert (matmul.allow_tf32, convolution.allow_tf32) == (enabled, enabled)
        precisions = matmul.fp32_precision, convolution.conv.fp32_precision
        assert all((precision == "tf32") is enabled for precision in precisions)
        assert torch.get_float32_matmul_precision() == ("high" if enabled else "highest")
    finally:
        matmul.allow_tf32, convolution.allow_tf32 = before


def test_the_host_is_at_most_one_micro_batch_ahead() -> None:
    """Before work for a micro-batch is queued, the one before the last has been finished."""
    log: list[str] = []

    class Event:
        count = 0

        def __init__(self) -> None:
            Event.count += 1
            self.number = Event.count

        def record(self) -> None:
            log.append(f"all before {self.number} is queued")

        def synchronize(self) -> None:
            log.append(f"all before {self.number} is done")

    run_ahead = RunAhead(Event)
    for number in range(1, 4):
        run_ahead.limit()
        log.append(f"compute {number}")
    assert log == [
        "all before 1 is queued",
        "compute 1",
        "all before 2 is queued",
        "all before 1 is done",
        "compute 2",
        "all before 3 is queued",
        "all before 2 is done",
        "compute 3",
    ]


def test_operations_without_a_deterministic_kernel_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With deterministic=true an operation that may differ between runs raises."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    deterministic: Any = torch.utils.deterministic
    try:
        use_deterministic_kernels()
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8", "the user's own value stays"
        with pytest.raises(RuntimeError, match="deterministic"):
            torch.zeros(3).put_(torch.tensor([0, 0]), torch.tensor([1.0, 2.0]))
    finally:
        torch.use_deterministic_algorithms(False)
        deterministic.fill_uninitialized_memory = True


def test_objects_are_moved_without_a_wait_where_they_can_be() -> None:
    """The method `to` of an object gets `non_blocking` if it takes it, as PackedSequence does."""
    calls: list[tuple[str, dict[str, Any]]] = []

    class Plain:
        def to(self, device: torch.device) -> Plain:
            calls.append(("plain", {}))
            return self

    class Asynchronous:
        def to(self, device: torch.device, *, non_blocking: bool = False) -> Asynchronous:
            calls.append(("asynchronous", {"non_blocking": non_blocking}))
            return self

    cpu = torch.device("cpu")
    for value in (Plain(), Asynchronous()):
        assert move_object(value, cpu) is value
    assert calls == [("plain", {}), ("asynchronous", {"non_blocking": True})]
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    assert torch.equal(move_object(packed, cpu).data, packed.data)


META = torch.device("meta")
"""A device without values, which stands for a GPU."""


class Annotation:
    """An object of an unknown class that holds anything."""

    def __init__(self, content: Any) -> None:
        self.content = content


class Slotted:
    """An object without a dictionary of attributes."""

    __slots__ = ("content",)

    def __init__(self, content: Any) -> None:
        self.content = content


@dataclass
class Boxes:
    """A dataclass with an attribute that is not a field."""

    corners: torch.Tensor

    def __post_init__(self) -> None:
        self.areas = torch.ones(3)


class Named(dict[str, Any]):
    """A dictionary with an attribute."""


class Movable:
    """An object with a method `to`, which keeps one of its tensors on the CPU."""

    def __init__(self, values: torch.Tensor) -> None:
        self.values, self.lengths = values, torch.ones(2)

    def to(self, device: torch.device) -> Movable:
        return Movable(self.values.to(device))


def named() -> Named:
    """Return a dictionary with a tensor in an attribute."""
    value = Named(x=torch.ones(2))
    value.mask = torch.ones(2)  # type: ignore[attr-defined]
    return value


def looped() -> Annotation:
    """Return an object that holds itself, and a tensor."""
    value = Annotation(None)
    value.content = [value, torch.ones(2)]
    return value


LEFT: dict[str, tuple[Callable[[], Any], str, str]] = {
    "an object": (
        lambda: (torch.ones(2), Annotation(torch.ones(2))),
        "batch[1].content",
        "an Annotation",
    ),
    "an object in an object": (
        lambda: {"a": [Annotation({"b": Slotted(torch.ones(2))})]},
        "batch['a'][0].content['b'].content",
        "a Slotted",
    ),
    "a set": (lambda: {"ids": {torch.ones(2)}}, "batch['ids'] (an element)", "a set"),
    "an attribute that is no field": (
        lambda: {"boxes": Boxes(torch.ones(2))},
        "batch['boxes'].areas",
        "a Boxes",
    ),
    "an attribute of a dictionary": (named, "batch.mask", "a Named"),
    "an object that holds itself": (looped, "batch.content[1]", "a list"),
}


@pytest.mark.parametrize("name", LEFT)
def test_a_tensor_that_stays_on_the_cpu_is_refused(name: str) -> None:
    """The error names the way to the tensor in the batch and the class that holds it."""
    make, path, owner = LEFT[name]
    batch = make()
    with pytest.raises(RecipeError) as caught:
        Placement(META).copy(batch)
    assert str(caught.value).startswith(f"{path} is a tensor on the CPU")
    assert f"what {owner} holds" in str(caught.value)
    offers_method = "a method to(device)" in str(caught.value)
    assert offers_method is (type_of(owner) not in ("set", "list"))
    Placement(torch.device("cpu")).copy(batch)


def type_of(owner: str) -> str:
    """Return the name of a class without its article."""
    return owner.partition(" ")[2]


def test_what_a_method_to_leaves_on_the_cpu_is_not_refused() -> None:
    """Objects with a method `to` decide what they move, as PackedSequence does."""
    packed = torch.nn.utils.rnn.pack_sequence([torch.ones(3, 2), torch.ones(2, 2)])
    batch = {
        "packed": packed,
        "own": Movable(torch.ones(2)),
        "encoding": UserDict(ids=torch.ones(2)),
        "names": ["a", None, 3, 2.5],
        "array": np.ones(3),
    }
    moved = Placement(META).copy(batch)
    assert moved["packed"].data.device == moved["own"].values.device == META
    assert moved["packed"].batch_sizes.device.type == "cpu"
    assert moved["own"].lengths.device.type == "cpu"
    assert moved["encoding"]["ids"].device == META
    assert moved["names"] == batch["names"]
    assert moved["array"] is batch["array"]


def test_only_the_first_batch_of_a_kind_is_searched(monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch is searched if it is the first, or the first with an object of some class."""
    searched: list[Any] = []
    monkeypatch.setattr(placement, "check_moved", lambda batch, _: searched.append(batch))
    on_device = Placement(META)
    kinds = [(torch.ones(2), 1), (torch.ones(2), Annotation(3)), [Slotted(4), Annotation(5)]]
    for batch in kinds * 3:
        on_device.copy(batch)
    assert [type(batch) for batch in searched] == [tuple, tuple, list]


def test_a_method_that_moves_in_place_is_refused() -> None:
    """A method `to` without a return value is an error that names the class."""

    class InPlace:
        def to(self, device: torch.device) -> None:
            pass

    with pytest.raises(RecipeError, match=r"InPlace, whose method to\(device\) returned None"):
        Placement(META).copy({"x": InPlace()})
