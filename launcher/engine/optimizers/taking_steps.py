"""Takes the step of an optimizer, which is skipped where the gradient is not finite."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer

from launcher.engine.optimizers.named import is_own, parts_of
from launcher.engine.optimizers.shard_steps import step_shards, updates_by_shards
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe


def take_step(optimizer: Optimizer, recipe: Recipe, finite: bool | Tensor) -> None:
    """Update the parameters if the gradient is `finite`.

    Fused kernels read a `finite` tensor on the device. For other optimizers of recipes' own
    functions, and for weights that fused kernels do not take, the host waits for its value, because
    it decides whether to call `step`. A step that creates the optimizer's state also waits, because
    fused SGD would keep an uninitialised momentum buffer if it skipped that step (torch 2.13).

    torch wraps `step` in a profiler range, hooks and a graph break, which together take 50 us, more
    than a step of a small network. Optimizers that `make_optimizer` creates have no hooks, so their
    unwrapped function is called.

    Args:
        optimizer: The optimizer, whose parameters have gradients.
        recipe: The recipe from which `make_optimizer` created it.
        finite: Whether the gradient is finite: a bool, or a scalar tensor on the device.
    """
    if not isinstance(recipe.optimizer, OptimizerSpec):
        if isinstance(finite, Tensor) and _skips_on_device(optimizer):
            _step_unless(optimizer, finite.logical_not().float())
        elif bool(finite):
            optimizer.step()
        return
    with torch.no_grad():
        for part in parts_of(optimizer):
            _take_named_step(part, finite)


def _take_named_step(optimizer: Optimizer, finite: bool | Tensor) -> None:
    """Take a step with an optimizer that `make_optimizer` created, if the gradient is `finite`."""
    found_inf = None
    if isinstance(finite, Tensor) and (is_own(optimizer) or _has_state(optimizer)):
        found_inf = finite.logical_not().float()
    elif not bool(finite):
        return
    if _updates_by_kernel(optimizer, shards=found_inf is not None):
        _step_sgd(optimizer, found_inf)
        return
    if found_inf is None and updates_by_shards(optimizer):
        step_shards(optimizer)
        return
    if found_inf is not None:
        if is_own(optimizer) or optimizer.param_groups[0]["fused"]:
            optimizer.found_inf = found_inf  # type: ignore[attr-defined]
        elif not bool(finite):
            return
    _unwrapped_step(type(optimizer).step)(optimizer)


def _skips_on_device(optimizer: Optimizer) -> bool:
    """Return whether a recipe's own optimizer skips a step by a number on the device.

    torch's fused optimizers do, and others that tell `torch.amp.GradScaler` so. Hooks of `step`
    would run in skipped steps as well, so with hooks the host decides.
    """
    groups = optimizer.param_groups
    return (
        getattr(optimizer, "_step_supports_amp_scaling", False)
        and all(group.get("fused", True) for group in groups)
        and not optimizer._optimizer_step_pre_hooks  # noqa: SLF001
        and not optimizer._optimizer_step_post_hooks  # noqa: SLF001
        and all(
            optimizer.state.get(parameter) or not group.get("momentum", True)
            for group in groups
            for parameter in group["params"]
            if parameter.grad is not None
        )
    )


def _step_unless(optimizer: Optimizer, found_inf: Tensor) -> None:
    """Call `step`, which changes nothing if `found_inf` is 1, as `torch.amp.GradScaler` does."""
    attributes: Any = optimizer
    attributes.grad_scale, attributes.found_inf = None, found_inf
    try:
        optimizer.step()
    finally:
        del attributes.grad_scale, attributes.found_inf


def _has_state(optimizer: Optimizer) -> bool:
    """Return whether a step creates no more state: SGD without momentum has none at all."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    return any(optimizer.state.get(weight) for weight in weights) or not any(
        group.get("momentum", True) for group in optimizer.param_groups
    )


def _updates_by_kernel(optimizer: Optimizer, *, shards: bool) -> bool:
    """Return whether `_step_sgd` can take the step.

    Args:
        optimizer: The optimizer, whose parameters have gradients.
        shards: Whether it may update shards that torch's own step updates without a fused kernel.
    """
    if type(optimizer) is not SGD:
        return False
    for group in optimizer.param_groups:
        used = [weight for weight in group["params"] if weight.grad is not None]
        if not used:
            continue
        first, has_buffers = used[0], group["momentum"] != 0
        is_fused = group["fused"] or (shards and isinstance(first, DTensor))
        if not (is_fused and first.is_floating_point()):
            return False
        for weight in used:
            if weight.dtype != first.dtype or weight.device != first.device:
                return False
            if type(weight) is not type(first) or (has_buffers and not optimizer.state.get(weight)):
                return False
    return True


def _step_sgd(optimizer: Optimizer, found_inf: Tensor | None) -> None:
    """Take a step of SGD with the fused kernel, on this rank's shards of the weights.

    torch's own step has no fused kernel for DTensors, and with plain tensors it takes twice as long
    before it calls the kernel.

    Args:
        optimizer: An SGD that has its momentum buffers.
        found_inf: A scalar tensor on the device, 1 to skip the step; None takes it.
    """
    for group in optimizer.param_groups:
        used = [p for p in group["params"] if p.grad is not None]
        momentum = group["momentum"]
        buffers = [optimizer.state[p]["momentum_buffer"] for p in used] if momentum else []
        gradients = [p.grad for p in used]
        if used and isinstance(used[0], DTensor):
            kept = [index for index, p in enumerate(used) if p.to_local().numel()]
            used, gradients, buffers = (
                [tensors[index].to_local() for index in kept if tensors]
                for tensors in (used, gradients, buffers)
            )
        if not used:  # all shards of this rank are empty, and the kernel looks at the first one
            continue
        torch._fused_sgd_(
            used,
            gradients,
            buffers,
            weight_decay=group["weight_decay"],
            momentum=momentum,
            lr=group["lr"],
            dampening=group["dampening"],
            nesterov=group["nesterov"],
            maximize=group["maximize"],
            is_first_step=False,
            found_inf=found_inf,
        )


@functools.cache
def _unwrapped_step(step: Callable[..., Any]) -> Callable[[Optimizer], None]:
    return inspect.unwrap(step)
