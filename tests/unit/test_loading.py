"""The per-rank DataLoader policy."""

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
        ({"usable_cores": 16, "nproc_per_node": 8}, 2, "capped at 16 usable cores"),
        ({"usable_cores": 2, "nproc_per_node": 8}, 1, "capped at 2 usable cores"),
        ({"usable_cores": 64, "in_memory": True}, 0, "the samples are in memory"),
        ({"usable_cores": 1, "num_workers": 9}, 9, "as asked"),
        ({"usable_cores": 64, "num_workers": 0}, 0, "as asked"),
    ],
)
def test_workers(arguments: dict[str, Any], workers: int, reason: str) -> None:
    """Four workers a rank, capped by the cores, none for samples in memory, or as asked."""
    policy = loader_policy(**arguments)
    assert policy.workers_per_rank == workers
    assert reason in policy.workers_reason


@pytest.mark.parametrize(
    ("device", "asked", "pinned"),
    [
        ("cuda", None, True),
        ("cuda", False, False),
        ("cpu", None, False),
        ("cpu", True, False),
    ],
)
def test_pinned_memory(device: str, asked: bool | None, pinned: bool) -> None:
    """Memory is pinned where there is a GPU to copy to, unless asked otherwise."""
    policy = loader_policy(usable_cores=8, device=device, pin_memory=asked)
    assert policy.pin_memory is pinned


@pytest.mark.parametrize("workers", [0, 2])
def test_a_policy_is_arguments_of_a_dataloader(workers: int) -> None:
    """Any other loop can use the policy as it is."""
    policy = loader_policy(usable_cores=8, device="cpu", num_workers=workers)
    loader = DataLoader(TensorDataset(torch.arange(4)), batch_size=2, **policy.dataloader_kwargs())
    assert [batch.tolist() for (batch,) in loader] == [[0, 1], [2, 3]]
