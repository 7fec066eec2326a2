"""A small net, and optimizers that train it, for unit tests."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from launcher import (
    adamw,
)
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.recipes.digits import digits

SMALL = adamw(weight_decay=0.1, state_dtype="bf16")
EIGHT = adamw(weight_decay=0.1, state_dtype="int8")


def net() -> Any:
    """Return a net with an embedding, a convolution, a norm, hidden matrices and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 6), nn.Conv1d(4, 5, 3), nn.LayerNorm(4), nn.Linear(4, 7), nn.Linear(7, 3)
    )


def train(
    named: Any,
    steps: int,
    *,
    finite: Callable[[int], bool] = lambda _: True,
    as_tensor: bool = True,
) -> list[Tensor]:
    """Return weights and states after steps with gradients that depend on the step alone."""
    configuration = replace(digits(), optimizer=named)
    model = net()
    optimizer = make_optimizer(configuration, model, 0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        is_finite = finite(step)
        if not is_finite:
            next(model.parameters()).grad = torch.full((9, 6), math.nan)
            model[4].weight.grad = torch.full((3, 7), math.inf)
        take_step(optimizer, configuration, torch.tensor(is_finite) if as_tensor else is_finite)
    states = [optimizer.state[weight] for weight in model.parameters()]
    return [
        *(weight.detach() for weight in model.parameters()),
        *(value for state in states for value in state.values()),
    ]


def step_with(optimizer: Any, model: nn.Module, steps: int) -> None:
    """Take steps with the gradients of `train`."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()
