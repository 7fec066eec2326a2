"""Weights in bfloat16, layers in 4 bits, and layers that compute in fp8."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from examples import LAPTOP, NODE, recipe
from small_nets import SMALL
from torch import nn

from launcher import (
    PlanError,
    RecipeError,
    adamw,
    four_bits,
    make_plan,
    muon,
    schedule_free,
    sgd,
)
from launcher.engine.model.four_bits import unpacked
from launcher.engine.model.fp8 import compute_in_fp8, fp8_layers
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.state.parameter_kinds import check_parameters, keep_in_bfloat16
from launcher.recipes.digits import digits


@pytest.mark.parametrize("named", [sgd(), adamw(), SMALL, muon(), schedule_free()], ids=str)
def test_weights_in_bfloat16_follow_those_in_float32(named: Any) -> None:
    """Small updates, which rounding to the nearest drops, add up in the mean of a weight."""
    final = []
    for dtype in ("fp32", "bf16"):
        model: Any = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2))
        nn.init.constant_(model[0].weight, 1.0)
        if dtype == "bf16":
            model = model.bfloat16()
        configuration = replace(
            digits(), optimizer=named, precision="bf16", param_dtype=dtype, max_grad_norm=None
        )
        optimizer = make_optimizer(configuration, model, 1e-4)
        torch.manual_seed(0)
        for _ in range(20):
            for weight in model.parameters():
                weight.grad = torch.rand(weight.shape).to(weight.dtype)
            take_step(optimizer, configuration, finite=True)
        assert model[0].weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        final.append(model[0].weight.double().mean().item() - 1.0)
    assert final[1] == pytest.approx(final[0], rel=0.1)


def test_layers_in_4_bits() -> None:
    """A layer keeps 4.5 bits a weight and its bias, and gives inputs the gradient of its weight."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 5)
    small = four_bits(layer)
    assert small.packed.numel() * 8 / layer.weight.numel() == 4.5
    assert not any(parameter.requires_grad for parameter in small.parameters())
    weight = unpacked(small.packed, 128, torch.float32)
    assert (weight - layer.weight).norm() < 0.1 * layer.weight.norm()
    inputs = torch.randn(3, 128, requires_grad=True)
    outputs = small(inputs)
    outputs.sum().backward()
    torch.testing.assert_close(outputs, nn.functional.linear(inputs, weight, layer.bias))
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand(3, 128))
    with torch.autocast("cpu", torch.bfloat16):
        assert small(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"precision": "fp32"}, "precision=bf16"),
        ({"strategy": "zero2"}, "strategy=fsdp"),
        ({"optimizer": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)}, "adamw"),
        ({"virtual_ranks": 8, "exact": True}, "strategy=fsdp"),
    ],
)
def test_weights_in_bfloat16_are_refused(changes: dict[str, Any], advice: str) -> None:
    """A plan refuses settings that contradict weights in bf16, with what to use."""
    settings = {"precision": "bf16", "param_dtype": "bf16", **changes}
    with pytest.raises(PlanError, match=advice):
        make_plan(recipe(**settings), NODE)
    make_plan(recipe(precision="bf16", param_dtype="bf16", strategy="fsdp"), NODE)


def test_models_that_cannot_be_in_bfloat16_are_refused() -> None:
    """BatchNorm with weights in bf16, and whole numbers under DeepSpeed, are refused by name."""
    with pytest.raises(RecipeError, match="GroupNorm"):
        keep_in_bfloat16(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    plan = make_plan(recipe(strategy="zero3"), NODE)
    with pytest.raises(RecipeError, match=r"0\.packed .*uint8.* strategy=ddp or fsdp"):
        check_parameters(nn.Sequential(four_bits(nn.Linear(4, 4)), nn.Linear(4, 1)), plan)


def test_layers_that_compute_in_fp8() -> None:
    """Trained linear layers whose sizes are multiples of 16 compute in fp8, but for the last."""
    model = nn.Sequential(
        nn.Linear(32, 48), nn.Linear(48, 20), nn.Linear(20, 32), four_bits(nn.Linear(32, 32)),
        nn.Linear(32, 64), nn.Linear(64, 16),
    )  # fmt: skip
    assert fp8_layers(model) == ["0", "4"]
    model[4].requires_grad_(False)
    assert fp8_layers(model) == ["0"]
    with pytest.raises(RecipeError, match="multiples of 16"):
        compute_in_fp8(nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("machine", "changes", "advice"),
    [
        (LAPTOP, {}, "Ada or Hopper"),
        (replace(NODE, has_torchao=False), {}, "pip install torchao"),
        (NODE, {"precision": "fp32"}, "precision=bf16"),
        (NODE, {"strategy": "zero3"}, "strategy=fsdp"),
    ],
)
def test_fp8_is_refused(machine: Any, changes: dict[str, Any], advice: str) -> None:
    """A plan refuses fp8 without GPUs, torchao or bf16, and under DeepSpeed."""
    with pytest.raises(PlanError, match=advice):
        make_plan(recipe(**{"precision": "bf16", "fp8": True, **changes}), machine)
    make_plan(recipe(precision="bf16", fp8=True), NODE)
