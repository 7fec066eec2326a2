"""Whether an optimizer of the recipe updates weights that are split as it updates whole ones.

Its step is tried on a few small weights, whole and split, before the first step of the run.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from launcher.engine.state.sharded_tensors import gather_full

_KNOWN = ("torch.optim", "launcher")
"""Modules whose optimizers are listed where they cannot train."""

_MAX_GROUPS = 8
_NUM_STEPS = 3
_LR = 0.01
_TOLERANCE = 1e-3
"""Largest relative difference of updates in float64; the optimizer may keep state in bf16."""

_NUM_ELEMENTS = 7
"""Elements of the first piece of flattened weights, which ends within a weight."""


def updates_elements_alone(optimizer: Optimizer) -> bool:
    """Return whether pieces of flattened weights are updated as whole weights are.

    It is true of an optimizer whose step cannot be tried, or draws random numbers.
    """

    def split(whole: list[Tensor]) -> list[list[Tensor]]:
        flat = torch.cat([tensor.flatten() for tensor in whole])
        return [[flat[:_NUM_ELEMENTS]], [flat[_NUM_ELEMENTS:]]]

    return _updates_alike(optimizer, split, torch.device("cpu"), rows=3)


def updates_shards(optimizer: Optimizer) -> bool:
    """Return whether weights that FSDP has sharded are updated as whole ones are (collective).

    Args:
        optimizer: The optimizer of the sharded weights.
    """
    weights = (p for group in optimizer.param_groups for p in group["params"])
    sharded = next((weight for weight in weights if isinstance(weight, DTensor)), None)
    if sharded is None:
        return True
    mesh, placements = sharded.device_mesh, sharded.placements

    def split(whole: list[Tensor]) -> list[list[Tensor]]:
        return [[distribute_tensor(each, mesh, placements, src_data_rank=None) for each in whole]]

    return _updates_alike(optimizer, split, torch.device(mesh.device_type), rows=2 * mesh.size())


def _updates_alike(
    optimizer: Optimizer,
    split: Callable[[list[Tensor]], list[list[Tensor]]],
    device: torch.device,
    *,
    rows: int,
) -> bool:
    if type(optimizer).__module__.startswith(_KNOWN):
        return True
    state = torch.get_rng_state()
    try:
        return all(
            _group_updates_alike(optimizer, number, split, device, rows)
            for number in range(min(len(optimizer.param_groups), _MAX_GROUPS))
        )
    except Exception:  # noqa: BLE001  # whatever the optimizer's own code raises
        return True
    finally:
        torch.set_rng_state(state)


def _group_updates_alike(
    optimizer: Optimizer,
    number: int,
    split: Callable[[list[Tensor]], list[list[Tensor]]],
    device: torch.device,
    rows: int,
) -> bool:
    generator = torch.Generator().manual_seed(0)

    def draw() -> list[Tensor]:
        sizes = (rows, 4), (rows,)
        drawn = (torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes)
        return [each.to(device) for each in drawn]

    weights, gradients = draw(), [draw() for _ in range(_NUM_STEPS)]
    whole, again = (_train(optimizer, number, weights, gradients) for _ in range(2))
    if not torch.equal(whole, again):
        return True
    parts = zip(split(weights), zip(*map(split, gradients), strict=True), strict=True)
    updated = torch.cat([_train(optimizer, number, *each) for each in parts])
    before = torch.cat([weight.flatten() for weight in weights])
    largest = (whole - before).abs().max()
    return bool((updated - whole).abs().max() <= _TOLERANCE * largest)


def _train(
    optimizer: Optimizer,
    number: int,
    weights: Sequence[Tensor],
    gradients: Sequence[Sequence[Tensor]],
) -> Tensor:
    """Return the elements of weights after steps with gradients, by a copy of an optimizer."""
    trained = [nn.Parameter(weight.clone()) for weight in weights]
    copied = _copy_for(optimizer, number, trained)
    for of_step in gradients:
        for weight, gradient in zip(trained, of_step, strict=True):
            weight.grad = gradient.clone()
        copied.step()
    return torch.cat([_whole(weight.detach()).flatten() for weight in trained])


def _whole(tensor: Tensor) -> Tensor:
    return gather_full(tensor) if isinstance(tensor, DTensor) else tensor


def _copy_for(optimizer: Optimizer, number: int, trained: list[nn.Parameter]) -> Any:
    """Return a copy of an optimizer that trains these weights by one of its groups.

    Args:
        optimizer: The optimizer, of which the copy shares no weight.
        number: The number of the group.
        trained: The weights.
    """
    stand_in = nn.Parameter(torch.ones(1))
    memo: dict[int, Any] = {
        id(weight): stand_in for group in optimizer.param_groups for weight in group["params"]
    }
    memo[id(optimizer.state)] = defaultdict(dict)  # of large weights, if it has been created
    copied = type(optimizer).__new__(type(optimizer))
    vars(copied).update(copy.deepcopy(vars(optimizer), memo))
    group = copied.param_groups[number]
    copied.param_groups[:] = [group | {"params": trained, "lr": _LR}]
    return copied
