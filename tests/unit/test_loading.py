"""The DataLoader policy of each rank."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from launcher import loader_policy


@pytest.mark.parametrize(
    ("arguments", "workers", "reason"),
    [
        ({"usable_cores": 64, "nproc_per_node": 8}, 4, "4 per rank"),
        ({"usable_cores": 16, "nproc_per_node": 8}, 2, "16 usable cores"),
        ({"usable_cores": 2, "nproc_per_node": 8}, 1, "2 usable cores"),
        ({"usable_cores": 64, "in_memory": True}, 0, "in memory"),
        ({"usable_cores": 64, "data_on_device": True}, 0, "on the device"),
        ({"usable_cores": 1, "num_workers": 9}, 9, "as asked"),
        ({"usable_cores": 64, "num_workers": 0}, 0, "as asked"),
    ],
)
def test_workers(arguments: dict[str, Any], workers: int, reason: str) -> None:
    """Each rank has four workers, limited by the cores; none in memory; or the number asked for."""
    policy = loader_policy(**arguments)
    assert policy.workers_per_rank == workers
    assert reason in policy.workers_reason


@pytest.mark.parametrize(
    ("device", "pin_memory", "pinned"),
    [
        ("cuda", None, True),
        ("cuda", False, False),
        ("cpu", None, False),
        ("cpu", True, False),
    ],
)
def test_pinned_memory(device: str, pin_memory: bool | None, pinned: bool) -> None:
    """Memory is pinned if there is a GPU to copy to, unless the user declines."""
    policy = loader_policy(usable_cores=8, device=device, pin_memory=pin_memory)
    assert policy.pin_memory is pinned


@pytest.mark.parametrize("workers", [0, 2])
def test_a_policy_is_arguments_of_a_dataloader(workers: int) -> None:
    """A policy's keyword arguments are valid for PyTorch's DataLoader."""
    policy = loader_policy(usable_cores=8, device="cpu", num_workers=workers)
    loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, **policy.dataloader_kwargs())
    assert [batch.tolist() for (batch,) in loader] == [[0, 1], [2, 3]]
