"""The contents of a checkpoint, under names that are the same for every strategy.

Tensors:

    model/<parameter>              weights
    optimizer/<parameter>/<key>    the optimizer's state of a parameter, such as exp_avg; if several
                                   objectives train it, those after the first as exp_avg@NAME
    buffer/<name>                  a buffer that is equal on all ranks
    buffer/<name>@<rank>           a buffer of one rank, such as BatchNorm's running statistics

Values that are not tensors are in checkpoint.json, as `optimizer/<parameter>/<key>` and, for the
extra state of modules, `extra/<module>`.

A tensor is full, or a shard that records its place in the full tensor: a DTensor or a `Fragment`.
The values of the schedule are not saved, because they follow from the step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_leaves

from launcher.engine.optimizers.eight_bit import SCALE, zeros_by_row
from launcher.engine.optimizers.joint import OF
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Fragment
from launcher.engine.state.hyperparameters import SCHEDULED
from launcher.engine.state.shared_memory import SharedMemory
from launcher.errors import CheckpointError, TrainingError
from launcher.printable import kind_of
from launcher.runs.manifest import StateValues

_REMEDY = "Use an optimizer that keeps tensors, numbers and strings in `state[parameter]`."

STEP = "step"
"""The key under which torch's optimizers count steps, in a scalar for parameters of any shape."""


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """The part of a checkpoint that one rank writes."""

    tensors: dict[str, Tensor | Fragment]
    """Copies of tensors, on the host."""

    memory: SharedMemory
    """The memory in which most of them lie."""

    release: Callable[[], None]
    """Gives the memory of the copies back, after which they must not be read."""

    values: dict[str, Any]
    """State of the optimizer that is not tensors, the same on every rank."""

    extra: dict[str, Any]
    """The extra state of modules, on all ranks."""


class StateSource(Protocol):
    """A saved state that can be read."""

    name: str
    """The name for error messages."""

    world_size: int
    """The number of ranks that wrote the state."""

    values: StateValues
    """The values that are not tensors."""

    steps: int
    """The number of optimizer steps taken before the state was saved."""

    has_complete_state: bool
    """Whether the optimizer state is known to be complete."""

    def size(self, name: str) -> torch.Size | None:
        """Return the full size of a tensor, or None if the source does not contain it."""

    def names(self) -> Iterable[str]:
        """Return the names of all tensors."""

    def dtype(self, name: str) -> torch.dtype:
        """Return the dtype of a tensor."""

    def read(self, targets: dict[str, Tensor]) -> None:
        """Fill the targets, full tensors or shards, with the tensors of the same names."""


def parameters(module: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters by name, a shared parameter under its first name only.

    The names are those of the uncompiled module.
    """
    return {plain_name(name): parameter for name, parameter in module.named_parameters()}


def live_tensors(module: nn.Module, optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """Yield the weights and the tensors of the optimizer state, without copying them.

    Buffers are not included. `check_optimizer` detects state that this function does not cover.
    """
    for name, parameter in parameters(module).items():
        yield f"model/{name}", parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            if isinstance(value, Tensor):
                yield f"optimizer/{name}/{key}", value


def plain_values(module: nn.Module, optimizer: Optimizer) -> dict[str, Any]:
    """Return the optimizer state of each parameter that is not tensors."""
    return {
        f"optimizer/{name}/{key}": value
        for name, parameter in parameters(module).items()
        for key, value in optimizer.state.get(parameter, {}).items()
        if not isinstance(value, Tensor)
    }


def check_optimizer(tensors: Iterable[Tensor], optimizer: Optimizer) -> None:
    """Check that a checkpoint can hold all state of an optimizer.

    Args:
        tensors: The tensors whose state is saved: the parameters, or the flat tensors that replace
            them.
        optimizer: An optimizer that has taken a step.

    Raises:
        TrainingError: The optimizer has state of other tensors, or state of a type that a
            checkpoint cannot hold.
    """
    kind, saved = type(optimizer).__name__, set(tensors)
    for key, state in optimizer.state.items():
        if key not in saved:
            owner = "a tensor that is not a parameter of the model"
            raise TrainingError(
                f"{kind} keeps state of {owner if isinstance(key, Tensor) else repr(key)}, which a "
                f"checkpoint would lose: it saves only the state of parameters. {_REMEDY}"
            )
        for name, value in state.items():
            if not (isinstance(value, Tensor) or is_plain(value)):
                raise TrainingError(
                    f"{kind} keeps {kind_of(value)} under {name!r} in its state, which a "
                    f"checkpoint cannot hold. {_REMEDY}"
                )
    for group in optimizer.param_groups:
        _check_state_is_complete(group["params"], saved, optimizer)
        for name, value in group.items():
            if name not in ("params", *SCHEDULED) and _contains_tensor(value):
                raise TrainingError(
                    f"{kind} keeps tensors under {name!r} in a parameter group, which a "
                    f"checkpoint would lose. {_REMEDY}"
                )
    if type(optimizer).state_dict is Optimizer.state_dict:
        return
    if extra_keys := sorted(optimizer.state_dict().keys() - {"state", "param_groups"}):
        raise TrainingError(
            f"The state_dict of {kind} contains {', '.join(map(repr, extra_keys))} besides 'state' "
            f"and 'param_groups', which a checkpoint would lose. {_REMEDY}"
        )


def _check_state_is_complete(group: list[Tensor], saved: set[Tensor], optimizer: Optimizer) -> None:
    """Check that either all trained parameters of a group have optimizer state, or none.

    torch's own optimizers keep the same state of each parameter, and each step updates all of them.

    Raises:
        TrainingError: Some parameters have state and others have none.
    """
    trained = [parameter for parameter in group if parameter.requires_grad and parameter in saved]
    stateless = [parameter for parameter in trained if not optimizer.state.get(parameter)]
    is_torchs = type(optimizer).__module__.startswith("torch.optim.")
    if is_torchs and trained and 0 < len(stateless) < len(trained):
        raise TrainingError(
            f"{type(optimizer).__name__} has state of {len(trained) - len(stateless):,} parameters "
            f"in a group, but none of {len(stateless):,} others: it was lost, or these parameters "
            "were added during the run. Create the optimizer with all parameters that will be "
            "trained."
        )


def _contains_tensor(value: Any) -> bool:
    return any(isinstance(leaf, Tensor) for leaf in tree_leaves(value))


def group_values(optimizer: Optimizer) -> list[dict[str, Any]]:
    """Return the plain values of each parameter group, in which some optimizers keep counters."""
    return [
        {key: value for key, value in group.items() if key != "params" and is_plain(value)}
        for group in optimizer.param_groups
    ]


def read_into(module: nn.Module, optimizer: Optimizer, source: StateSource) -> None:
    """Fill weights and optimizer state, full or sharded, from a source.

    Raises:
        CheckpointError: The model has different parameters, or parameters of different shapes.
    """
    named_parameters = parameters(module)
    check_names(source, named_parameters)
    targets: dict[str, Tensor] = {}
    for name, parameter in named_parameters.items():
        check_size(source, f"model/{name}", parameter.shape)
        targets[f"model/{name}"] = parameter.detach()
    groups = {parameter: group for group in optimizer.param_groups for parameter in group["params"]}
    for name, parameter in named_parameters.items():
        if parameter not in groups:
            continue
        tensors = empty_state(source, name, parameter.detach(), groups[parameter])
        targets |= {f"optimizer/{name}/{key}": tensor for key, tensor in tensors.items()}
        if state := tensors | state_values(source, name):
            optimizer.state[parameter] = state
    source.read(targets)


def empty_state(
    source: StateSource,
    name: str,
    parameter: Tensor,
    group: Mapping[str, Any],
    size: torch.Size | None = None,
) -> dict[str, Tensor]:
    """Return tensors of zeros for the saved optimizer state of a parameter, by key.

    Args:
        source: The saved state.
        name: The name of the parameter.
        parameter: The parameter, or the flat tensor that the optimizer updates in its place.
        group: The parameter's group in the optimizer.
        size: The full size of the parameter, if it differs from that of the tensor.
    """
    state = {}
    for full_key, full_name in state_names(source, name).items():
        key = full_key.partition(OF)[0]
        saved_size, dtype = source.size(full_name), source.dtype(full_name)
        if key != STEP and saved_size == (parameter.shape if size is None else size):
            state[full_key] = torch.zeros_like(parameter, dtype=dtype)
            continue
        # The device is the one that torch's own load_state_dict chooses: a step count stays on the
        # host unless the kernels read it on the device, and state of another shape, such as
        # Adafactor's rows and columns, is on the parameter's device.
        if key.endswith(SCALE) and saved_size is not None and isinstance(parameter, DTensor):
            state[full_key] = zeros_by_row(parameter, saved_size[1], dtype)
            continue
        on_host = key == STEP and not (group.get("fused") or group.get("capturable"))
        device = torch.device("cpu") if on_host else parameter.device
        state[full_key] = torch.zeros(saved_size or (), dtype=dtype, device=device)
    return state


def missing_optimizer_state(
    source: StateSource, module: nn.Module, optimizer: Optimizer
) -> list[str]:
    """Return the parameters whose optimizer state is missing from a checkpoint.

    Launcher 0.1 lost optimizer state under strategy=fsdp: a checkpoint saved after an evaluation
    has none, or none of the parameters outside of blocks. Only checkpoints of format 1 can lack it.
    """
    if source.has_complete_state or not source.steps:
        return []
    trained = [name for name, weight in parameters(module).items() if weight.requires_grad]
    lost = [name for name in trained if not state_names(source, name)]
    is_stateless = isinstance(optimizer, SGD) and not any(
        group["momentum"] for group in optimizer.param_groups
    )
    return [] if len(lost) == len(trained) and is_stateless else lost


def changed_groups(optimizer: Optimizer, before: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the group values that changed since `group_values` returned `before`.

    Values that the schedule writes are not included.
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
    """Write the values that `changed_groups` returned into the optimizer's groups."""
    for group, values in zip(optimizer.param_groups, changed, strict=False):
        for key, value in values.items():
            group[key] = tuple(value) if isinstance(value, list) else value


def state_names(source: StateSource, parameter: str) -> dict[str, str]:
    """Return the saved optimizer tensors of a parameter, as a dict from key to tensor name."""
    prefix = f"optimizer/{parameter}/"
    return {name.removeprefix(prefix): name for name in source.names() if name.startswith(prefix)}


def state_values(source: StateSource, parameter: str) -> dict[str, Any]:
    """Return the saved optimizer values of a parameter that are not tensors, by key."""
    prefix = f"optimizer/{parameter}/"
    values = source.values["optimizer"]
    return {
        name.removeprefix(prefix): value
        for name, value in values.items()
        if name.startswith(prefix)
    }


def check_names(source: StateSource, names: Iterable[str]) -> None:
    """Check that a source has the parameters of the recipe's model.

    Args:
        source: The saved state.
        names: The parameters of the recipe's model.

    Raises:
        CheckpointError: The source has other parameters.
    """
    saved = {name.removeprefix("model/") for name in source.names() if name.startswith("model/")}
    if differing := sorted(saved ^ set(names)):
        where = "the checkpoint" if differing[0] in saved else "the recipe"
        raise CheckpointError(
            f"{source.name} belongs to another model: {len(differing)} parameters are only in the "
            f"checkpoint or only in the recipe, such as {differing[0]}, which only {where} has. "
            "Resume with the recipe that wrote the checkpoint."
        )


def check_size(source: StateSource, name: str, size: torch.Size) -> None:
    """Check that a source has a tensor of the recipe's size.

    Raises:
        CheckpointError: The tensor has another size, or is missing.
    """
    saved_size = source.size(name)
    if saved_size != size:
        saved = "is missing from" if saved_size is None else f"has shape {tuple(saved_size)} in"
        raise CheckpointError(
            f"{source.name} belongs to another model: {name} {saved} the checkpoint and has shape "
            f"{tuple(size)} in the recipe. Resume with the recipe that wrote the checkpoint."
        )


def is_plain(value: Any) -> bool:
    """Return whether JSON can hold a value: numbers, strings, None, and lists and dicts of them."""
    if isinstance(value, (list, tuple)):
        return all(map(is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and is_plain(item) for key, item in value.items())
    return value is None or isinstance(value, (bool, int, float, str))
