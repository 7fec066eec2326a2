"""Optimizer steps on FSDP's shards, skipped on the device without a wait of the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_module

from launcher import Recipe, adamw, sgd
from launcher.engine.state.hyperparameters import make_optimizer, take_step
from launcher.recipes.digits import digits

OPTIMIZERS = {
    "sgd": sgd(momentum=0.9, nesterov=True, weight_decay=1e-3),
    "sgd without momentum": sgd(momentum=0.0),
    "adamw": adamw(weight_decay=0.1, decay_1d=False),
}


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Yield the mesh of a process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


def train(recipe: Recipe, finite: list[bool], mesh: DeviceMesh | None) -> list[torch.Tensor]:
    """Return the weights after steps of which some are skipped.

    Args:
        recipe: Its optimizer trains two layers.
        finite: Whether the gradient of each step is finite.
        mesh: Where the weights are DTensors; None trains plain weights.
    """
    torch.manual_seed(0)
    model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    if mesh is not None:
        model = distribute_module(model, mesh)
    optimizer = make_optimizer(recipe, model, 0.1)
    for step, is_finite in enumerate(finite):
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter) * (step + 1)
        # A tensor is what the norm of the gradient on a device gives.
        take_step(optimizer, recipe, is_finite if mesh is None else torch.tensor(is_finite))
    return [getattr(p, "_local_tensor", p).detach() for p in model.parameters()]


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_steps_on_shards_equal_steps_on_weights(name: str, mesh: DeviceMesh) -> None:
    """Steps with DTensors, also skipped ones, give the bits of the same steps with tensors."""
    recipe = replace(digits(), optimizer=OPTIMIZERS[name])
    finite = [False, True, True, False, True, True]
    for sharded, plain in zip(
        train(recipe, finite, mesh), train(recipe, finite, None), strict=True
    ):
        assert torch.equal(sharded, plain)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_only_the_first_step_waits(
    name: str, mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The host reads whether the gradient is finite at most once, when state is created."""
    reads = []
    read = torch.Tensor.__bool__

    def counted(tensor: torch.Tensor) -> bool:
        reads.append(tensor)
        return read(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", counted)
    train(replace(digits(), optimizer=OPTIMIZERS[name]), [True] * 5, mesh)
    assert len(reads) <= (0 if name == "sgd without momentum" else 1)
