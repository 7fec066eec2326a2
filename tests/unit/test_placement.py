"""The GPU of a rank, without a GPU."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from torch._C._distributed_c10d import HashStore

from launcher.engine.backends.devices import (
    check_own_device,
    device_index,
    set_tf32,
    use_deterministic_kernels,
)
from launcher.engine.backends.placement import RunAhead, move_object
from launcher.environment.machine import read_machine
from launcher.environment.world import World
from launcher.errors import WorldError
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
