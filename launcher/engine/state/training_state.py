"""What a checkpoint holds of a training, by names that are the same under every strategy.

    model/<parameter>              weights
    optimizer/<parameter>/<key>    what the optimizer keeps of it, such as exp_avg
    buffer/<name>                  a buffer that is the same on all ranks
    buffer/<name>@<rank>           a rank's own, such as BatchNorm's statistics of what it has seen

Values that are not tensors lie beside them in checkpoint.json: `optimizer/<parameter>/<key>`, and
`extra/<module>` for the extra state of modules.

Tensors are whole, or shards that know of which whole they are a part (DTensor). The schedule's
numbers are no state: they follow from the step.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves

from launcher.engine.state.compiled import plain_name
from launcher.engine.state.hyperparameters import SCHEDULED
from launcher.errors import CheckpointError, TrainingError
from launcher.runs.manifest import Values

_KEPT = "Use an optimizer that keeps tensors, numbers and texts in `state[parameter]`."

STEP = "step"
"""The key under which torch's optimizers count steps, whatever the shape of the parameter."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What one rank keeps of a training."""

    tensors: dict[str, Tensor]
    """On the host, copies."""

    values: dict[str, Any]
    """What the optimizer keeps besides; the same on every rank."""

    extra: dict[str, Any]
    """The extra state of modules, of all ranks."""


class StateSource(Protocol):
    """Where a state is read from."""

    name: str
    """What a message calls it."""

    world_size: int
    """Ranks that wrote it."""

    values: Values
    """What is no tensor."""

    steps: int
    """Optimizer steps that had been taken."""

    lists_state: bool
    """Whether the state of the optimizer is known to be complete."""

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
    """Return the parameters by name, those that several names share under the first.

    The names are those of the module before it was compiled.
    """
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def live_tensors(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield weights and optimizer state as they are, without the buffers.

    `check_optimizer` finds state that would be left out.
    """
    for name, parameter in parameters(module).items():
        yield f"model/{name}", parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{name}/{key}", value


def plain_values(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return what the optimizer keeps of each parameter besides tensors."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in parameters(module).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if not isinstance(value, Tensor)
    }


def check_optimizer(own: Iterable[Tensor], optimizer: Optimizer) -> None:
    """Refuse an optimizer that keeps state which a checkpoint would not hold.

    Args:
        own: The tensors whose state is saved: the parameters, or what stands for them.
        optimizer: An optimizer that has taken a step.

    Raises:
        TrainingError: It keeps state of something else, or of a kind that cannot be written.
    """
    kind, known = type(optimizer).__name__, set(own)
    for key, kept in optimizer.state.items():
        if key not in known:
            whose = "a tensor that is no parameter of the model"
            raise TrainingError(
                f"{kind} keeps state of {whose if isinstance(key, Tensor) else repr(key)}, which a "
                f"checkpoint would lose: it holds the state of each parameter. {_KEPT}"
            )
        for name, value in kept.items():
            if not (isinstance(value, Tensor) or is_plain(value)):
                raise TrainingError(
                    f"{kind} keeps a {type(value).__name__} called {name!r} in its state, which a "
                    f"checkpoint cannot hold. {_KEPT}"
                )
    for group in optimizer.param_groups:
        _check_complete(group["params"], known, optimizer)
        for name, value in group.items():
            if name not in ("params", *SCHEDULED) and _holds_tensor(value):
                raise TrainingError(
                    f"{kind} keeps tensors called {name!r} in a parameter group, which a "
                    f"checkpoint would lose. {_KEPT}"
                )
    if type(optimizer).state_dict is Optimizer.state_dict:
        return
    if more := sorted(optimizer.state_dict().keys() - {"state", "param_groups"}):
        raise TrainingError(
            f"The state_dict of {kind} holds {', '.join(map(repr, more))} besides 'state' and "
            f"'param_groups', which a checkpoint would lose. {_KEPT}"
        )


def _check_complete(group: list[Tensor], known: set[Tensor], optimizer: Optimizer) -> None:
    """Refuse a group in which some parameters have state and others have lost theirs.

    torch's own optimizers keep the same of each parameter that they update, and each step updates
    every trained one.

    Raises:
        TrainingError: Some have none.
    """
    trained = [each for each in group if each.requires_grad and each in known]
    without = [each for each in trained if not optimizer.state.get(each)]
    torchs = type(optimizer).__module__.startswith("torch.optim.")
    if torchs and trained and 0 < len(without) < len(trained):
        raise TrainingError(
            f"{type(optimizer).__name__} keeps state of {len(trained) - len(without):,} parameters "
            f"in a group and none of {len(without):,}: theirs has been lost, or they were added in "
            "the course of the run. Make the optimizer of all parameters that will be trained."
        )


def _holds_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the plain values of each parameter group, which some optimizers count in."""
    return [
        {key: value for key, value in group.items() if key != "params" and is_plain(value)}
        for group in optimizer.param_groups
    ]


def read_into(module: nn.Module, optimizer: Optimizer, source: StateSource) -> None:
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
    source: StateSource,
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
        if key != STEP and source.size(full) == (parameter.shape if size is None else size):
            state[key] = torch.zeros_like(parameter, dtype=source.dtype(full))
            continue
        # Where torch's own load_state_dict puts it: a count of steps stays on the host unless the
        # kernels read it on the device; what has another shape, such as Adafactor's rows and
        # columns, lies beside the parameter.
        on_host = key == STEP and not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if on_host else parameter.device
        state[key] = torch.zeros(source.size(full) or (), dtype=source.dtype(full), device=device)
    return state


def lost_state(source: StateSource, module: nn.Module, optimizer: Optimizer) -> list[str]:
    """Return the parameters whose optimizer state a checkpoint should hold and does not.

    Launcher 0.1 lost it under strategy=fsdp: a checkpoint that was saved after an evaluation holds
    none, or none of the parameters outside of blocks. Checkpoints of format 1 are looked at for it.
    """
    if source.lists_state or not source.steps:
        return []
    trained = [name for name, each in parameters(module).items() if each.requires_grad]
    lost = [name for name in trained if not state_names(source, name)]
    keeps_none = isinstance(optimizer, SGD) and not any(
        group["momentum"] for group in optimizer.param_groups
    )
    return [] if len(lost) == len(trained) and keeps_none else lost


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


def state_names(source: StateSource, parameter: str) -> dict[str, str]:
    """Return the tensors that the optimizer kept of a parameter: its key, and its full name."""
    prefix = f"optimizer/{parameter}/"
    return {full.removeprefix(prefix): full for full in source.names() if full.startswith(prefix)}


def state_values(source: StateSource, parameter: str) -> dict[str, Any]:
    """Return the plain values that the optimizer kept of a parameter."""
    prefix = f"optimizer/{parameter}/"
    kept = source.values["optimizer"]
    return {
        name.removeprefix(prefix): value for name, value in kept.items() if name.startswith(prefix)
    }


def check_names(source: StateSource, own: Iterable[str]) -> None:
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


def check_size(source: StateSource, name: str, size: torch.Size) -> None:
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


def is_plain(value: Any) -> bool:
    """Return whether JSON can hold a value: numbers, texts, None, lists and dicts of those."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(each) for key, each in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
