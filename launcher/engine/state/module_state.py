"""The state of a model besides its parameters: buffers and extra state.

Extra state is the return value of a module's `get_extra_state` (torch.nn.Module). Buffers and extra
state may differ between ranks, because each rank's forward pass processes different samples. A
checkpoint then holds the values of every rank.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Container, Iterable, Iterator
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from launcher.engine.state.compiled import plain_name
from launcher.engine.state.training_state import StateSource, is_plain
from launcher.errors import CheckpointError, TrainingError

Gather = Callable[[Any], list[Any]]
"""A collective function that returns the values of all ranks, as `Backend.gather` does."""

_VIRTUAL = "v"
"""Marks, in the name of a saved buffer, the number of a virtual rank instead of that of a rank."""

_TENSOR_KEY = "__tensor__"
"""The key that marks a tensor of extra state in JSON."""


class Slot(NamedTuple):
    """A registered buffer of a module, which may still be None."""

    module: nn.Module
    key: str

    @property
    def buffer(self) -> Tensor | None:
        """The current buffer."""
        return self.module._buffers[self.key]  # noqa: SLF001

    def put(self, buffer: Tensor | None) -> None:
        """Replace the buffer."""
        self.module._buffers[self.key] = buffer  # noqa: SLF001


def saved_slots(model: nn.Module) -> dict[str, Slot]:
    """Return the slots of the persistent buffers by name, a shared buffer under its first name.

    Slots that hold None are included.
    """
    slots, seen = {}, set()
    for prefix, module in model.named_modules():
        for key, buffer in module._buffers.items():  # noqa: SLF001
            if key in module._non_persistent_buffers_set or id(buffer) in seen:  # noqa: SLF001
                continue
            if buffer is not None:
                seen.add(id(buffer))
            slots[plain_name(f"{prefix}.{key}" if prefix else key)] = Slot(module, key)
    return slots


def virtual_name(name: str, virtual_rank: int) -> str:
    """Return the name in a checkpoint of a virtual rank's copy of a buffer."""
    return f"buffer/{name}@{_VIRTUAL}{virtual_rank}"


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes and shape."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().tobytes(), zlib.crc32(repr(tuple(tensor.shape)).encode()))


def buffers_to_save(
    model: nn.Module, rank: int, gather: Gather, without: Container[str] = ()
) -> dict[str, Tensor]:
    """Return host copies of the buffers that this rank saves (collective).

    Rank 0 saves all buffers. The other ranks save only buffers that differ between ranks.

    Args:
        model: The model.
        rank: This rank.
        gather: A collective function that returns the values of all ranks.
        without: Names of buffers that are saved elsewhere.

    Returns:
        The copies, under the names that a checkpoint uses.
    """
    buffers = {
        name: slot.buffer.detach().cpu().clone().contiguous()
        for name, slot in saved_slots(model).items()
        if slot.buffer is not None and name not in without
    }
    checksums = gather({name: checksum(buffer) for name, buffer in buffers.items()})
    differing = _differing_names(checksums)
    return {
        f"buffer/{name}@{rank}" if name in differing else f"buffer/{name}": buffer
        for name, buffer in buffers.items()
        if name in differing or rank == 0
    }


def _differing_names(checksums: list[dict[str, int]]) -> set[str]:
    """Return the names whose checksums differ between ranks, given one dict per rank."""
    names = {name for rank_checksums in checksums for name in rank_checksums}
    return {
        name
        for name in names
        if len({rank_checksums.get(name) for rank_checksums in checksums}) > 1
    }


@torch.no_grad()
def read_buffers(
    model: nn.Module, source: StateSource, rank: int, world_size: int, device: torch.device
) -> None:
    """Fill the model's buffers with those that this rank saved, or with the mean over ranks.

    The mean is used when the number of ranks has changed. A buffer takes its saved shape, which a
    forward pass may have changed since the model was built.

    Args:
        model: The model.
        source: The saved state.
        rank: This rank.
        world_size: The current number of ranks.
        device: The device for buffers whose slot is still None.

    Raises:
        CheckpointError: The model has other buffers than the source, or the number of ranks has
            changed and buffers that differ between ranks have no mean.
    """
    slots = saved_slots(model)
    saved_names = _saved_buffer_names(source)
    slots |= _new_slots(model, saved_names.keys() - slots.keys())
    _check_buffer_names(source, slots, set(saved_names))
    chosen_names = {
        name: _choose_names(name, full_names, rank, world_size, source)
        for name, full_names in saved_names.items()
    }
    targets = {
        full_name: torch.empty(source.size(full_name) or (), dtype=source.dtype(full_name))
        for full_names in chosen_names.values()
        for full_name in full_names
    }
    if targets:
        source.read(targets)
    for name, full_names in chosen_names.items():
        tensors = [targets[full_name] for full_name in full_names]
        counts = isinstance(slots[name].module, _NormBase)
        _put(slots[name], _mean(source, name, tensors, counts=counts), device)


def _new_slots(model: nn.Module, names: Iterable[str]) -> dict[str, Slot]:
    """Register and return slots for saved buffers that a forward pass creates in known modules."""
    modules = {
        plain_name(f"{name}.").removesuffix("."): module for name, module in model.named_modules()
    }
    slots = {}
    for name in names:
        prefix, _, key = name.rpartition(".")
        module = modules.get(prefix)
        if module is not None and not hasattr(module, key):
            module.register_buffer(key, None)
            slots[name] = Slot(module, key)
    return slots


def _saved_buffer_names(source: StateSource) -> dict[str, list[str]]:
    """Return the tensor names in the source for each buffer: one for all ranks, or one per rank."""
    names: dict[str, list[str]] = {}
    for full_name in source.names():
        if full_name.startswith("buffer/"):
            name = full_name.removeprefix("buffer/").partition("@")[0]
            names.setdefault(name, []).append(full_name)
    return names


def _check_buffer_names(source: StateSource, slots: dict[str, Slot], saved: set[str]) -> None:
    """Check that the source has the buffers of the recipe's model.

    Raises:
        CheckpointError: The source lacks a buffer, or has one that the model has no slot for.
    """
    filled = sorted(name for name, slot in slots.items() if slot.buffer is not None)
    only_in_recipe = [name for name in filled if name not in saved]
    only_in_source = sorted(saved - slots.keys())
    if only_in_recipe or only_in_source:
        name, where = (
            (only_in_source[0], "the checkpoint")
            if only_in_source
            else (only_in_recipe[0], "the recipe")
        )
        raise CheckpointError(
            f"{source.name} belongs to another model: only {where} has a buffer {name}. Resume "
            "with the recipe that wrote the checkpoint."
        )


def _choose_names(
    name: str, full_names: list[str], rank: int, world_size: int, source: StateSource
) -> list[str]:
    """Return the names of the saved tensors from which this rank restores the buffer `name`."""
    if full_names == [f"buffer/{name}"] or full_names[0].startswith(f"buffer/{name}@{_VIRTUAL}"):
        return full_names
    if world_size == source.world_size:
        rank_name = f"buffer/{name}@{rank}"
        return [rank_name] if rank_name in full_names else []
    return [f"buffer/{name}@{saved_rank}" for saved_rank in range(source.world_size)]


def _mean(source: StateSource, name: str, tensors: list[Tensor], *, counts: bool) -> Tensor | None:
    """Return the mean of a buffer over ranks, or None if this rank had no buffer.

    Args:
        source: The saved state.
        name: The name of the buffer.
        tensors: The buffers of the ranks.
        counts: Whether integer buffers count batches, as BatchNorm's do. Ranks may have had
            different numbers of batches, so the result is the maximum.

    Raises:
        CheckpointError: The buffers differ and have no mean.
    """
    if not tensors:
        return None
    first = tensors[0]
    if all(torch.equal(tensor, first) for tensor in tensors[1:]):
        return first
    if counts and not first.is_floating_point():
        return torch.stack(tensors).amax(0)
    if not first.is_floating_point() or any(tensor.shape != first.shape for tensor in tensors):
        raise CheckpointError(
            f"{source.name}: the buffer {name} differs between the {source.world_size} ranks that "
            "wrote the checkpoint, and it has no mean, because it holds integers or its shapes "
            f"differ. Resume on {source.world_size} ranks."
        )
    return torch.stack([tensor.double() for tensor in tensors]).mean(0).to(first.dtype)


def _put(slot: Slot, value: Tensor | None, device: torch.device) -> None:
    buffer = slot.buffer
    if value is None or buffer is None or buffer.shape != value.shape or _overlaps(buffer):
        target_device = device if buffer is None else buffer.device
        slot.put(None if value is None else value.to(target_device))
    else:
        buffer.copy_(value)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several elements share memory, as in an expanded tensor."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in pairs)


def _stateful_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the names and modules that have extra state."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield plain_name(f"{name}.").removesuffix("."), module


def check_extra_state(model: nn.Module) -> None:
    """Check that a checkpoint can hold the extra state of all modules.

    Raises:
        TrainingError: `get_extra_state` of a module returns a value that is not made of tensors,
            numbers, strings, lists, and dicts with string keys.
    """
    for name, module in _stateful_modules(model):
        if type_name := _unsupported_type(module.get_extra_state()):
            raise TrainingError(
                f"get_extra_state of {name or 'the model'} returns a {type_name}, which a "
                "checkpoint cannot hold. Return tensors, numbers, strings, lists, and dicts with "
                "string keys."
            )


def _unsupported_type(value: Any) -> str | None:
    """Return the name of a type in `value` that a checkpoint cannot hold, or None."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return next(filter(None, map(_unsupported_type, value.values())), None)
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_unsupported_type, value)), None)
    return None if isinstance(value, Tensor) or is_plain(value) else type(value).__name__


def gather_extra_state(model: nn.Module, gather: Gather) -> dict[str, Any]:
    """Return the extra state of all ranks, the same dict on every rank (collective)."""
    if not any(True for _ in _stateful_modules(model)):
        return {}
    states = {name: _encode(module.get_extra_state()) for name, module in _stateful_modules(model)}
    rank_texts = gather({name: json.dumps(state) for name, state in states.items()})
    extra: dict[str, Any] = {}
    for name, text in rank_texts[0].items():
        if all(texts.get(name) == text for texts in rank_texts):
            extra[f"extra/{name}"] = json.loads(text)
        else:
            extra |= {
                f"extra/{name}@{rank}": json.loads(texts[name])
                for rank, texts in enumerate(rank_texts)
            }
    return extra


def read_extra_state(model: nn.Module, source: StateSource, rank: int, world_size: int) -> None:
    """Restore the extra state of each module.

    Modules whose extra state is missing from the source are not changed; `missing_extra_state`
    names them.

    Raises:
        CheckpointError: The extra state differs between the ranks that wrote the source, and the
            number of ranks has changed.
    """
    extra = source.values.get("extra", {})
    for name, module in _stateful_modules(model):
        shared_key, rank_key = f"extra/{name}", f"extra/{name}@{rank}"
        if shared_key in extra:
            module.set_extra_state(_decode(extra[shared_key]))
        elif rank_key in extra and world_size == source.world_size:
            module.set_extra_state(_decode(extra[rank_key]))
        elif f"extra/{name}@0" in extra:
            raise CheckpointError(
                f"{source.name}: the extra state (get_extra_state) of {name or 'the model'} "
                f"differs between the {source.world_size} ranks that wrote the checkpoint. Resume "
                f"on {source.world_size} ranks."
            )


def missing_extra_state(model: nn.Module, source: StateSource) -> list[str]:
    """Return the names of modules whose extra state is missing from the source."""
    saved = {key.partition("@")[0] for key in source.values.get("extra", {})}
    modules = _stateful_modules(model)
    return [name or "the model" for name, _ in modules if f"extra/{name}" not in saved]


def _encode(value: Any) -> Any:
    """Return `value` with its tensors as safetensors in base64, for JSON."""
    if isinstance(value, Tensor):
        data = safetensors.torch.save({"value": value.detach().cpu().contiguous()})
        return {_TENSOR_KEY: base64.b64encode(data).decode()}
    if isinstance(value, dict):
        return {key: _encode(item) for key, item in value.items()}
    return [_encode(item) for item in value] if isinstance(value, (list, tuple)) else value


def _decode(value: Any) -> Any:
    """Return the value that `_encode` encoded."""
    if isinstance(value, dict):
        if value.keys() == {_TENSOR_KEY}:
            return safetensors.torch.load(base64.b64decode(value[_TENSOR_KEY]))["value"]
        return {key: _decode(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_decode(item) for item in value]
    return value
