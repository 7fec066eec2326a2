"""The loss scale of fp16, and steps that are skipped on the device."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from launcher.engine.backends.base import poison_nonfinite
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.loss_scaler import LossScaler
from launcher.recipes.digits import digits

CPU = torch.device("cpu")


def device_scaler(world_size: int) -> LossScaler:
    """Return a scaler that computes on tensors, as it does on a GPU."""
    scaler = LossScaler(world_size, CPU)
    scaler._is_on_host = False
    return scaler


def test_the_scale_follows_the_steps() -> None:
    """The scale is halved by each overflow, and doubled by each 2,000 steps in a row without."""
    scaler = LossScaler(1, CPU)
    scale, good_steps = 2.0**16, 0
    generator = random.Random(0)
    for _ in range(30_000):
        is_finite = generator.random() > 1 / 3_000
        scaler.update(torch.tensor(is_finite))
        good_steps = good_steps + 1 if is_finite else 0
        scale *= 0.5 if not is_finite else 2.0 if good_steps and good_steps % 2_000 == 0 else 1.0
        assert float(scaler.scale) == scale
    assert scaler.state() == {"scale": scale, "good_steps": good_steps % 2_000}


@pytest.mark.parametrize("good_steps", [1_999, 5_999])
def test_a_restored_scale_grows_at_the_same_step(good_steps: int) -> None:
    """A scaler continues from a checkpoint, also from one whose count went on after a growth."""
    scaler = LossScaler(1, CPU)
    scaler.restore({"scale": 8.0, "good_steps": good_steps})
    scaler.update(torch.tensor(True))
    assert scaler.state() == {"scale": 16.0, "good_steps": 0}


def test_an_overflow_at_the_smallest_scale_exhausts_it() -> None:
    """Only scales below 2**-14 are exhausted."""
    assert not LossScaler.is_exhausted(2.0**-14)
    assert LossScaler.is_exhausted(2.0**-15)


@pytest.mark.parametrize("world_size", [1, 3, 7])
def test_a_scale_on_the_device_gives_the_bits_of_a_scale_on_the_host(world_size: int) -> None:
    """Weights, gradients and norms are equal to the bit, wherever the scale is."""
    results: list[list[Tensor]] = []
    for scaler in (LossScaler(world_size, CPU), device_scaler(world_size)):
        torch.manual_seed(0)
        grads = [torch.randn(5, 3) * 1e4, torch.randn(7)]
        norm = scaler.unscale(grads, torch.tensor(1234.5))
        loss = torch.full((), 2.5)
        results.append([*grads, norm, poison_nonfinite(loss, world_size / 30 * scaler.factor)])
    for on_host, on_device in zip(*results, strict=True):
        assert torch.equal(on_host, on_device)


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], Optimizer]] = {
    "fused SGD": lambda weights: SGD(weights, lr=0.1, momentum=0.9, fused=True),
    "fused SGD without momentum": lambda weights: SGD(weights, lr=0.1, fused=True),
    "fused Adam": lambda weights: Adam(weights, lr=0.1, fused=True),
    "AdamW": lambda weights: AdamW(weights, lr=0.1, foreach=True),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_own_optimizers_skip_steps_exactly(name: str) -> None:
    """A recipe's own optimizer, fused or not, takes the same steps by tensors as by bools."""
    weights = []
    for as_tensor in (False, True):
        recipe = replace(digits(), optimizer=lambda *_: None)
        parameters = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(2, 2))]
        optimizer = OPTIMIZERS[name](parameters)
        for step, is_finite in enumerate([False, True, True, False, True]):
            for parameter in parameters:
                values = torch.full_like(parameter, step + 1.0)
                parameter.grad = values if is_finite else values * torch.inf
            take_step(optimizer, recipe, torch.tensor(is_finite) if as_tensor else is_finite)
        assert not hasattr(optimizer, "found_inf")
        counts = [state["step"] for state in optimizer.state.values() if "step" in state]
        assert all(float(count) == 3 for count in counts)
        weights.append([parameter.detach() for parameter in parameters])
    for by_tensor, by_bool in zip(*weights, strict=True):
        assert torch.equal(by_tensor, by_bool)


def test_hooks_of_an_own_optimizer_do_not_run_in_skipped_steps() -> None:
    """With a hook of `step`, the host decides, so that the hook sees the steps that are taken."""
    weight = nn.Parameter(torch.ones(3))
    optimizer = Adam([weight], lr=0.1, fused=True)
    recipe = replace(digits(), optimizer=lambda *_: None)
    calls: list[int] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(1))
    for is_finite in (True, False, True):
        weight.grad = torch.ones(3)
        take_step(optimizer, recipe, torch.tensor(is_finite))
    assert len(calls) == 2
