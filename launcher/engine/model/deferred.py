"""Builds a model without values, whose parameters are computed later, one after the other.

The model function runs on the meta device while its operations are recorded (recording.py). When
the model has been sharded, the operations are replayed (replay.py), and each rank keeps its part of
every parameter. All values, and the random generators afterwards, are to the bit those that the
model function gives in one process.
"""

from __future__ import annotations

import gc
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, MutableMapping, MutableSequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from launcher.engine.model.apparent_device import CannotDeferError
from launcher.engine.model.recording import OperationRecorder, Recording, View
from launcher.engine.model.replay import compute, replay
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.initial_values import OwnPart, value_checksum
from launcher.engine.state.meta_tensors import move_to_meta

_KINDS = (Tensor, nn.Parameter, nn.Buffer)


@dataclass(frozen=True, kw_only=True)
class _Attribute:
    """A tensor that a module keeps without registering it."""

    holder: MutableMapping[str, Any] | MutableSequence[Any]
    key: Any
    view: View

    def put(self, tensor: Tensor) -> None:
        self.holder[self.key] = tensor


@dataclass(kw_only=True)
class DeferredValues:
    """The values of a model that was built without them."""

    recording: Recording
    values: dict[str, View | Tensor]
    """The value of each parameter and buffer: what to compute, or the value itself."""

    parameters: frozenset[str]
    attributes: list[_Attribute]
    checksums: dict[str, int] = field(default_factory=dict)
    """Checksums of the parameters that have been filled."""

    def fill(self, parts: Mapping[str, OwnPart]) -> None:
        """Fill this rank's parts of parameters and buffers.

        If all of them are filled, the random generators end as after the model function.
        """
        names: dict[int, list[str]] = {}
        for name in parts:
            value = self.values[name]
            if isinstance(value, View):
                names.setdefault(value.storage, []).append(name)
            else:
                self._give(name, parts[name], value)
        attributes: dict[int, list[_Attribute]] = {}
        for attribute in self.attributes:
            attributes.setdefault(attribute.view.storage, []).append(attribute)

        def take(number: int, storage: torch.UntypedStorage) -> None:
            for name in names.get(number, ()):
                view = self.values[name]
                assert isinstance(view, View)
                self._give(name, parts[name], view.of(storage))
            for attribute in attributes.get(number, ()):
                attribute.put(attribute.view.of(storage).clone())

        wanted = names.keys() | attributes.keys()
        drawn = {v.storage for v in self.values.values() if isinstance(v, View)}
        replay(self.recording, wanted, take, draws_all=drawn <= wanted)
        self.values.clear()
        self.attributes.clear()

    def _give(self, name: str, part: OwnPart, value: Tensor) -> None:
        part.take(value)
        if name in self.parameters:
            self.checksums[name] = value_checksum(value)


def defer(build: Callable[[], nn.Module]) -> tuple[nn.Module, DeferredValues]:
    """Build a model on the meta device.

    Args:
        build: The model function. torch's generators are left as they were before, and those of
            Python and NumPy as the function leaves them.

    Returns:
        The model, and its values.

    Raises:
        CannotDeferError: The function does something that cannot be recorded, or fails.
    """
    recorder = OperationRecorder(compute)
    recording = recorder.recording
    try:
        with recorder:
            model = build()
    except CannotDeferError:
        recording.tokens.finish()
        raise
    except Exception as error:
        recording.tokens.finish()
        raise CannotDeferError(f"on the meta device it raises {type(error).__name__}") from error
    recording.operations += recording.tokens.finish()
    recording.check_constants()
    values = _values(model, recording)
    attributes = list(_attributes(model, recording))
    _check_holders(model, attributes, recording)
    parameters = {plain_name(n) for n, _ in model.named_parameters(remove_duplicate=False)}
    move_to_meta(model)
    return model, DeferredValues(
        recording=recording,
        values=values,
        parameters=frozenset(parameters),
        attributes=attributes,
    )


def _values(model: nn.Module, recording: Recording) -> dict[str, View | Tensor]:
    """Return what each parameter and buffer was recorded as.

    Raises:
        CannotDeferError: One has no shape yet, is of an unknown class, or was not recorded.
    """
    values: dict[str, View | Tensor] = {}
    for name, tensor in _registered(model):
        if is_lazy(tensor):
            raise CannotDeferError(f"{name} has no shape before the first batch")
        if type(tensor) not in _KINDS:
            raise CannotDeferError(f"{name} is a {type(tensor).__name__}")
        if not tensor.is_meta:
            values[plain_name(name)] = tensor.detach()
        elif recording.knows(tensor):
            values[plain_name(name)] = recording.view_of(tensor)
        else:
            raise CannotDeferError(f"{name} was made in a way that was not recorded")
    return values


def _registered(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from model.named_parameters(remove_duplicate=False)
    yield from model.named_buffers(remove_duplicate=False)


def _attributes(model: nn.Module, recording: Recording) -> Iterator[_Attribute]:
    """Yield the recorded tensors that modules keep as attributes, or in lists and dicts."""
    known = {id(tensor) for _, tensor in _registered(model)}
    visited: set[int] = set()

    def walk(holder: Any) -> Iterator[_Attribute]:
        if id(holder) in visited:
            return
        visited.add(id(holder))
        is_mapping = isinstance(holder, MutableMapping)
        for key, value in list(holder.items() if is_mapping else enumerate(holder)):
            if isinstance(value, Tensor):
                if value.is_meta and id(value) not in known and recording.knows(value):
                    yield _Attribute(holder=holder, key=key, view=recording.view_of(value))
            elif isinstance(value, (MutableMapping, MutableSequence)):
                yield from walk(value)

    for module in model.modules():
        fields = vars(module)
        visited |= {id(fields[name]) for name in ("_parameters", "_buffers", "_modules")}
        yield from walk(fields)


def _check_holders(model: nn.Module, attributes: list[_Attribute], recording: Recording) -> None:
    """Check that only the model's modules hold recorded tensors.

    Raises:
        CannotDeferError: Something else does, such as a closure or a cache, and would keep a
            tensor without values.
    """
    for attribute in attributes:  # which may hold others through an autograd graph
        attribute.put(torch.empty(0))
    if _is_held_elsewhere(model, recording):
        gc.collect()
        if _is_held_elsewhere(model, recording):
            raise CannotDeferError("tensors are kept outside of the model's modules")


def _is_held_elsewhere(model: nn.Module, recording: Recording) -> bool:
    tensors = {}
    for _, registered in _registered(model):
        tensor: Tensor | None = registered
        while tensor is not None and tensor.is_meta:
            tensors[id(tensor)] = tensor
            tensor = tensor._base  # noqa: SLF001  # a view keeps what it is a view of
    held = Counter(recording.storage_of(tensor) for tensor in tensors.values())
    count = torch._C._storage_Use_Count  # noqa: SLF001
    return any(
        count(storage._cdata) > 1 + held[number]  # noqa: SLF001
        for number, storage in enumerate(recording.storages)
    )
