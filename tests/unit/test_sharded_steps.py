"""Optimizer steps on FSDP's shards, skipped on the device without a wait of the host."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import distribute_module

from launcher import Recipe, adamw, sgd
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.recipe.optimizer import OptimizerSpec
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


@pytest.mark.parametrize(
    "spec",
    [
        *OPTIMIZERS.values(),
        sgd(momentum=0.5, weight_decay=0.1, decay_1d=True),
    ],
)
def test_steps_equal_those_of_torch(spec: OptimizerSpec) -> None:
    """Steps have the bits of torch's own `step`, and create the same state."""
    recipe = replace(digits(), optimizer=spec)
    weights = []
    for is_own in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        optimizer = make_optimizer(recipe, model, 0.1)
        for step in range(4):
            for parameter in model.parameters():
                parameter.grad = torch.randn(parameter.shape)
            if step == 2:  # a weight that this step does not use
                model[0].bias.grad = None
            if is_own:
                take_step(optimizer, recipe, True)
            else:
                optimizer.step()
        state = [value for each in optimizer.state.values() for value in each.values()]
        weights.append([*model.parameters(), *filter(torch.is_tensor, state)])
    assert len(weights[0]) == len(weights[1])
    for expected, found in zip(*weights, strict=True):
        assert torch.equal(expected, found)


@pytest.mark.parametrize(
    "spec",
    [
        *OPTIMIZERS.values(),
        sgd(momentum=0.5, weight_decay=0.1, decay_1d=True),
    ],
)
def test_steps_on_shards_equal_those_of_torch(spec: OptimizerSpec, mesh: DeviceMesh) -> None:
    """Steps with DTensors that the host decides on have the bits and the state of torch's own."""
    recipe = replace(digits(), optimizer=spec)
    found = []
    for is_own in (False, True):
        torch.manual_seed(0)
        model: nn.Module = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
        model = distribute_module(model, mesh)
        optimizer = make_optimizer(recipe, model, 0.1)
        for step in range(3):
            for parameter in model.parameters():
                parameter.grad = torch.ones_like(parameter) / (step + 3)
            if step == 1:  # a weight that this step does not use
                model.get_parameter("0.bias").grad = None
            if is_own:
                take_step(optimizer, recipe, False)
                take_step(optimizer, recipe, True)
            else:
                optimizer.step()
        state = [value for each in optimizer.state.values() for value in each.values()]
        found.append([*model.parameters(), *filter(torch.is_tensor, state)])
    assert len(found[0]) == len(found[1])
    for expected, own in zip(*found, strict=True):
        assert type(expected) is type(own)
        assert getattr(expected, "_spec", None) == getattr(own, "_spec", None)
        assert torch.equal(
            getattr(expected, "_local_tensor", expected), getattr(own, "_local_tensor", own)
        )


@pytest.mark.parametrize("name", ["sgd", "adamw"])
@pytest.mark.parametrize("kind", ["complex", "subclass"])
def test_weights_without_fused_kernels_are_trained(name: str, kind: str) -> None:
    """Complex weights, and weights of a class of their own, take the steps that are finite."""

    class OwnParameter(nn.Parameter):
        pass

    values = torch.ones(3, dtype=torch.complex64 if kind == "complex" else torch.float32)
    recipe = replace(digits(), optimizer=OPTIMIZERS[name])
    weights = []
    for as_tensor in (False, True):
        model = nn.Module()
        model.weight = nn.Parameter(values.clone()) if kind == "complex" else OwnParameter(values)
        optimizer = make_optimizer(recipe, model, 0.1)
        for is_finite in (True, False, True):
            model.weight.grad = torch.ones_like(model.weight)
            take_step(optimizer, recipe, torch.tensor(is_finite) if as_tensor else is_finite)
        weights.append(model.weight.detach().clone())
        values = torch.ones_like(values)
    assert torch.equal(*weights)


def test_a_rank_whose_shards_are_empty_skips_the_kernel(
    mesh: DeviceMesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fused kernel is not called with an empty list, whose first tensor CUDA would read."""
    sizes = []
    kernel: Any = torch._fused_sgd_

    def counted(params: list[torch.Tensor], *arguments: object, **options: object) -> None:
        sizes.append(len(params))
        kernel(params, *arguments, **options)

    monkeypatch.setattr(torch, "_fused_sgd_", counted)
    model = distribute_module(nn.Linear(4, 3), mesh)
    recipe = replace(digits(), optimizer=sgd(momentum=0.9, decay_1d=False))
    optimizer = make_optimizer(recipe, model, 0.1)
    weight: Any
    bias: Any
    weight, bias = model.parameters()
    for _ in range(2):
        weight.grad, bias.grad = torch.ones_like(weight), torch.ones_like(bias)
        take_step(optimizer, recipe, torch.tensor(True))
        bias._local_tensor = bias._local_tensor[:0]  # as on a rank beyond the last row
    assert sizes == [1]


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
