"""Steps of torch's SGD on this rank's shards, without the dispatch of operations on DTensors.

SGD updates each element by itself, so that the shards get the bits that torch's own step on the
DTensors gives them. DTensors look up how each operation is sharded: in the first two steps for each
shape of a weight, which on CPUs takes longer than the first ten steps of a small model.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.optim.sgd import sgd


def updates_by_shards(optimizer: Optimizer) -> bool:
    """Return whether `step_shards` can take the step: on CPUs, where torch has no kernel for it."""
    return type(optimizer) is SGD and all(
        not (group["foreach"] or group["fused"] or group["differentiable"])
        and all(_is_shard(weight) for weight in group["params"] if weight.grad is not None)
        for group in optimizer.param_groups
    )


def step_shards(optimizer: Optimizer) -> None:
    """Take a step of SGD on this rank's shards of the weights.

    Args:
        optimizer: An SGD for which `updates_by_shards` holds; its momentum buffers are made if this
            is its first step.
    """
    for group in optimizer.param_groups:
        used: list[DTensor] = [p for p in group["params"] if p.grad is not None]
        states = [optimizer.state[weight] for weight in used] if group["momentum"] else []
        before = [state.get("momentum_buffer") for state in states]
        buffers: list[Tensor | None] = [None if b is None else b.to_local() for b in before]
        sgd(
            [weight.to_local() for weight in used],
            [_gradient(weight).to_local() for weight in used],
            buffers,
            foreach=False,
            fused=False,
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
        )
        for weight, state, buffer in zip(used, states, buffers, strict=bool(states)):
            if state.get("momentum_buffer") is None and buffer is not None:
                state["momentum_buffer"] = _sharded_like(weight, buffer)


def _is_shard(weight: Tensor) -> bool:
    if not isinstance(weight, DTensor) or weight.device.type != "cpu":
        return False
    gradient = weight.grad
    return (
        isinstance(gradient, DTensor)
        and gradient.placements == weight.placements
        and gradient.dtype == weight.dtype
        and gradient.layout is torch.strided
    )


def _gradient(weight: Tensor) -> DTensor:
    assert isinstance(weight.grad, DTensor)
    return weight.grad


def _sharded_like(weight: DTensor, local: Tensor) -> DTensor:
    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=weight.shape,
        stride=weight.stride(),
    )
