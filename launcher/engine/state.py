"""What a checkpoint holds of a training, by names that are the same under every strategy.

    model/<parameter>              weights
    optimizer/<parameter>/<key>    what the optimizer keeps of it, such as exp_avg
    buffer/<name>                  a buffer that is the same on all ranks
    buffer/<name>@<rank>           a rank's own, such as BatchNorm's statistics of what it has seen

Tensors are whole, or shards that know of which whole they are a part (DTensor). The schedule's
numbers are no state: they follow from the step.
"""

from __future__ import annotations

import heapq
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launcher.checkpoints import Values
from launcher.engine.optimizers import SCHEDULED
from launcher.errors import CheckpointError, RecipeError

Gather = Callable[[Any], list[Any]]
"""Gathers a value of every rank, as `Backend.gather` does."""


@dataclass(frozen=True, kw_only=True)
class State:
    """What one rank keeps of a training."""

    tensors: dict[str, Tensor]
    """On the host, copies."""

    values: dict[str, Any]
    """What the optimizer keeps besides; the same on every rank."""


class Source(Protocol):
    """Where a state is read from."""

    name: str
    """What a message calls it."""

    world_size: int
    """Ranks that wrote it."""

    values: Values
    """What is no tensor."""

    def size(self, name: str) -> torch.Size | None:
        """Return the whole size of a tensor, or None where there is no such tensor."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""

    def dtype(self, name: str) -> torch.dtype:
        """Return a tensor's type."""

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill the targets, whole or shards, with the tensors of their names."""


def keep(tensors: Iterable[tuple[str, Tensor]], rank: int, world_size: int) -> dict[str, Tensor]:
    """Return copies on the host of what this rank keeps: its shards, and its share of the whole.

    Whole tensors, which every rank has, are shared out by size, the same on every rank.
    """
    loads = [(0, number) for number in range(world_size)]
    kept, wait = {}, False
    for name, tensor in tensors:
        if not isinstance(tensor, DTensor):
            load, owner = heapq.heappop(loads)
            heapq.heappush(loads, (load + tensor.numel() * tensor.element_size(), owner))
            if owner != rank:
                continue
        kept[name] = _to_host(tensor)
        wait = wait or tensor.is_cuda
    if wait:
        torch.cuda.synchronize()
    return kept


def _to_host(tensor: Tensor) -> Tensor:
    """Start to copy a tensor to pinned memory, or copy it where it is on the host already."""
    if isinstance(tensor, DTensor):
        return DTensor(_to_host(tensor.to_local()), tensor._spec, requires_grad=False)  # noqa: SLF001
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    return host.copy_(tensor.detach(), non_blocking=True)


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, those that several names share under the first."""
    return dict(module.named_parameters())


def live_tensors(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and optimizer state as they are, without the buffers."""
    for name, parameter in parameters(module).items():
        yield f"model/{name}", parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{name}/{key}", value


def plain_values(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return what the optimizer keeps of each parameter besides tensors.

    Raises:
        RecipeError: It keeps objects that a readable file cannot hold.
    """
    values: dict[str, Any] = {}
    for name, parameter in parameters(module).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                continue
            if not _is_plain(value):
                raise RecipeError(
                    f"{type(optimizer).__name__} keeps a {type(value).__name__} called {key!r} in "
                    "its state; checkpoints hold tensors, numbers and texts. Use an optimizer "
                    "whose state is made of those."
                )
            values[f"optimizer/{name}/{key}"] = value
    return values


def group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the plain values of each parameter group, which some optimizers count in."""
    return [
        {key: value for key, value in group.items() if key != "params" and _is_plain(value)}
        for group in optimizer.param_groups
    ]


def own_buffers(module: nn.Module, rank: int, gather: Gather) -> dict[str, Tensor]:
    """Return copies of the buffers that this rank keeps (collective).

    Rank 0 keeps all of its own; others those of theirs that differ from it.
    """
    saved = module.state_dict().keys()
    buffers = {
        name: buffer.detach().cpu().clone().contiguous()
        for name, buffer in module.named_buffers()
        if name in saved
    }
    own = {
        name: zlib.crc32(buffer.reshape(-1).view(torch.uint8).numpy().tobytes())
        for name, buffer in buffers.items()
    }
    of_ranks = gather(own)
    differing = {name for sums in of_ranks for name in sums if sums[name] != of_ranks[0].get(name)}
    return {
        f"buffer/{name}@{rank}" if name in differing else f"buffer/{name}": buffer
        for name, buffer in buffers.items()
        if name in differing or rank == 0
    }


def read_buffers(module: nn.Module, source: Source, rank: int, world_size: int) -> None:
    """Fill the module's buffers: with this rank's own, or else with the mean of all ranks'."""
    targets: dict[str, Tensor] = {}
    saved = module.state_dict().keys()
    for name, buffer in module.named_buffers():
        if name not in saved:
            continue
        if source.size(f"buffer/{name}") is not None:
            found = [f"buffer/{name}"]
        elif world_size == source.world_size:
            found = [f"buffer/{name}@{rank}"]
        else:
            found = [f"buffer/{name}@{each}" for each in range(source.world_size)]
        for each in found:
            check_size(source, each, buffer.shape)
            targets[each] = torch.empty(buffer.shape, dtype=source.dtype(each))
    if not targets:
        return
    source.read(targets)
    for name, buffer in module.named_buffers():
        read = [targets[each] for each in targets if each.partition("@")[0] == f"buffer/{name}"]
        if read:
            together = torch.stack([each.double() for each in read]).mean(0)
            exact = read[0] if len(read) == 1 or not buffer.is_floating_point() else together
            buffer.copy_(exact)


def read_into(module: nn.Module, optimizer: Optimizer, source: Source) -> None:
    """Fill weights and optimizer state, whole or sharded, from a source.

    Raises:
        CheckpointError: The model has other parameters, or some of another shape.
    """
    own = parameters(module)
    check_names(source, own)
    targets: dict[str, Tensor] = {}
    for name, parameter in own.items():
        check_size(source, f"model/{name}", parameter.shape)
        targets[f"model/{name}"] = parameter.detach()
    optimized = {each: group for group in optimizer.param_groups for each in group["params"]}
    for name, parameter in own.items():
        if parameter not in optimized:
            continue
        state = empty_state(source, name, parameter.detach(), optimized[parameter])
        targets |= {f"optimizer/{name}/{key}": tensor for key, tensor in state.items()}
        if kept := state | state_values(source, name):
            optimizer.state[parameter] = kept
    source.read(targets)


def empty_state(
    source: Source,
    name: str,
    parameter: Tensor,
    group: Mapping[str, Any],
    size: torch.Size | None = None,
) -> dict[str, Tensor]:
    """Return tensors to hold what the optimizer kept of a parameter, by its keys.

    Args:
        source: What was kept.
        name: The parameter's.
        parameter: It, or what the optimizer updates in its place.
        group: Its group in the optimizer.
        size: Its whole size where that is another than the tensor's.
    """
    state = {}
    for key, full in state_names(source, name).items():
        if source.size(full) == (parameter.shape if size is None else size):
            state[key] = torch.zeros_like(parameter, dtype=source.dtype(full))
            continue
        # Such as Adam's count of steps, which is on the device for kernels that read it there.
        device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
        state[key] = torch.zeros(source.size(full) or (), dtype=source.dtype(full), device=device)
    return state


def changed_groups(optimizer: Optimizer, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what the optimizer has counted in its groups since `group_values` returned `before`.

    What the schedule writes is left out.
    """
    return [
        {
            key: value
            for key, value in now.items()
            if key not in SCHEDULED and (key not in then or value != then[key])
        }
        for now, then in zip(group_values(optimizer), before, strict=True)
    ]


def write_groups(optimizer: Optimizer, changed: list[dict[str, Any]]) -> None:
    """Put back what `changed_groups` returned."""
    for group, values in zip(optimizer.param_groups, changed, strict=False):
        for key, value in values.items():
            group[key] = tuple(value) if isinstance(value, list) else value


def state_names(source: Source, parameter: str) -> dict[str, str]:
    """Return the tensors that the optimizer kept of a parameter: its key, and its full name."""
    prefix = f"optimizer/{parameter}/"
    return {full.removeprefix(prefix): full for full in source.names() if full.startswith(prefix)}


def state_values(source: Source, parameter: str) -> dict[str, Any]:
    """Return the plain values that the optimizer kept of a parameter."""
    prefix = f"optimizer/{parameter}/"
    kept = source.values["optimizer"]
    return {
        name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)
    }


def check_names(source: Source, own: Iterable[str]) -> None:
    """Refuse a source of another model.

    Raises:
        CheckpointError: It has other parameters.
    """
    theirs = {name.removeprefix("model/") for name in source.names() if name.startswith("model/")}
    if missing := sorted(theirs ^ set(own)):
        where = "the checkpoint" if missing[0] in theirs else "the recipe"
        raise CheckpointError(
            f"{source.name} is of another model: {len(missing)} parameters are not in both, such "
            f"as {missing[0]}, which only {where} has. Resume with the recipe that wrote it."
        )


def check_size(source: Source, name: str, size: torch.Size) -> None:
    """Refuse a tensor of another size than the recipe's.

    Raises:
        CheckpointError: It has another, or is not there.
    """
    found = source.size(name)
    if found != size:
        theirs = "missing" if found is None else f"of shape {tuple(found)}"
        raise CheckpointError(
            f"{source.name} is of another model: {name} is {theirs} there and of shape "
            f"{tuple(size)} in the recipe. Resume with the recipe that wrote it."
        )


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))
