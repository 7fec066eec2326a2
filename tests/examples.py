"""A recipe and two machines for unit tests of planning."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from launcher.environment.machine import Machine
from launcher.recipe.recipe import Recipe

LAPTOP = Machine(
    hostname="laptop",
    num_gpus=0,
    usable_cores=8,
    cores_limited_by="CPU affinity",
    memory_bytes=2**34,
    shm_bytes=2**33,
)
NODE = replace(LAPTOP, hostname="node1", num_gpus=8, usable_cores=64)


def nothing(*_: Any) -> Any:
    raise AssertionError("planning must not call the functions of a recipe")


def recipe(**changes: Any) -> Recipe:
    """Return a recipe with 256 samples per step, with some fields changed."""
    fields: dict[str, Any] = {
        "name": "example",
        "model": nothing,
        "data": nothing,
        "loss": nothing,
        "batch_size": 256,
        "lr": 0.1,
        "lr_batch_size": 256,
        "epochs": 10,
        "train_samples": 1437,
    }
    return Recipe(**fields | changes)
