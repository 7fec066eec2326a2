"""What a checkpoint keeps of a model besides its parameters: buffers, and extra state.

Extra state is what a module returns from `get_extra_state` (torch.nn.Module). Buffers and extra
state may differ between ranks, because each rank's forward sees other samples; then each rank keeps
its own.
"""

from __future__ import annotations

import base64
import json
import zlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import safetensors.torch
import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from launcher.engine.state.compiled import plain_name
from launcher.engine.state.training_state import StateSource, is_plain
from launcher.errors import CheckpointError, TrainingError

Gather = Callable[[Any], list[Any]]
"""Gathers a value of every rank, as `Backend.gather` does."""

_TENSOR = "__tensor__"
"""The key under which a tensor in extra state is kept in JSON."""


class Slot(NamedTuple):
    """A place in a module that holds a buffer, or None until one is made."""

    module: nn.Module
    key: str

    @property
    def buffer(self) -> Tensor | None:
        """The buffer that is there now."""
        return self.module._buffers[self.key]  # noqa: SLF001

    def put(self, buffer: Tensor | None) -> None:
        """Replace the buffer that is there."""
        self.module._buffers[self.key] = buffer  # noqa: SLF001


def saved_slots(model: nn.Module) -> dict[str, Slot]:
    """Return the places of the persistent buffers by name, a buffer with two names under the first.

    Places that hold None are included.
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


def checksum(tensor: Tensor) -> int:
    """Return the CRC-32 of a tensor's bytes and shape."""
    flat = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return zlib.crc32(flat.numpy().tobytes(), zlib.crc32(repr(tuple(tensor.shape)).encode()))


def buffers_to_save(model: nn.Module, rank: int, gather: Gather) -> dict[str, Tensor]:
    """Return copies on the host of the buffers that this rank keeps (collective).

    Rank 0 keeps all of its own. A buffer that differs between ranks is kept by each of them.
    """
    buffers = {
        name: slot.buffer.detach().cpu().clone().contiguous()
        for name, slot in saved_slots(model).items()
        if slot.buffer is not None
    }
    differing = _differing(gather({name: checksum(each) for name, each in buffers.items()}))
    return {
        f"buffer/{name}@{rank}" if name in differing else f"buffer/{name}": buffer
        for name, buffer in buffers.items()
        if name in differing or rank == 0
    }


def _differing(sums: list[dict[str, int]]) -> set[str]:
    """Return the names whose checksum is not the same on all ranks."""
    names = {name for of_rank in sums for name in of_rank}
    return {name for name in names if len({of_rank.get(name) for of_rank in sums}) > 1}


@torch.no_grad()
def read_buffers(
    model: nn.Module, source: StateSource, rank: int, world_size: int, device: torch.device
) -> None:
    """Fill the model's buffers: with this rank's own, or else with the mean of all ranks'.

    A buffer takes the shape that was saved, which a forward may have changed since the model was
    built.

    Args:
        model: The model.
        source: What was saved.
        rank: This rank.
        world_size: The number of ranks now.
        device: Where a buffer is put whose place is empty yet.

    Raises:
        CheckpointError: The checkpoint is of a model with other buffers, or the ranks that wrote it
            had buffers of their own that cannot be averaged over another number of ranks.
    """
    slots = saved_slots(model)
    found = _found_buffers(source)
    slots |= _new_slots(model, found.keys() - slots.keys())
    _check_buffer_names(source, slots, set(found))
    chosen = {name: _chosen(name, found[name], rank, world_size, source) for name in found}
    targets = {
        full: torch.empty(source.size(full) or (), dtype=source.dtype(full))
        for names in chosen.values()
        for full in names
    }
    if targets:
        source.read(targets)
    for name, names in chosen.items():
        tensors = [targets[full] for full in names]
        counts = isinstance(slots[name].module, _NormBase)
        _put(slots[name], _mean(source, name, tensors, counts=counts), device)


def _new_slots(model: nn.Module, names: Iterable[str]) -> dict[str, Slot]:
    """Return places for buffers that a forward has registered in modules that are there."""
    modules = {
        plain_name(f"{name}.").removesuffix("."): each for name, each in model.named_modules()
    }
    slots = {}
    for name in names:
        prefix, _, key = name.rpartition(".")
        module = modules.get(prefix)
        if module is not None and not hasattr(module, key):
            module.register_buffer(key, None)
            slots[name] = Slot(module, key)
    return slots


def _found_buffers(source: StateSource) -> dict[str, list[str]]:
    """Return the names in the source that hold each buffer: one for all ranks, or one each."""
    found: dict[str, list[str]] = {}
    for full in source.names():
        if full.startswith("buffer/"):
            found.setdefault(full.removeprefix("buffer/").partition("@")[0], []).append(full)
    return found


def _check_buffer_names(source: StateSource, slots: dict[str, Slot], found: set[str]) -> None:
    missing = sorted(name for name, slot in slots.items() if slot.buffer is not None)
    only_here = [name for name in missing if name not in found]
    only_there = sorted(found - slots.keys())
    if only_here or only_there:
        name, where = (
            (only_there[0], "the checkpoint") if only_there else (only_here[0], "the recipe")
        )
        raise CheckpointError(
            f"{source.name} is of another model: only {where} has a buffer {name}. Resume with the "
            "recipe that wrote it."
        )


def _chosen(
    name: str, names: list[str], rank: int, world_size: int, source: StateSource
) -> list[str]:
    """Return which of the saved buffers of one name this rank reads."""
    if names == [f"buffer/{name}"]:
        return names
    if world_size == source.world_size:
        own = f"buffer/{name}@{rank}"
        return [own] if own in names else []
    return [f"buffer/{name}@{each}" for each in range(source.world_size)]


def _mean(source: StateSource, name: str, tensors: list[Tensor], *, counts: bool) -> Tensor | None:
    """Return the mean of the ranks' buffers; None where this rank had none.

    Args:
        source: What was saved.
        name: The buffer's.
        tensors: It, as the ranks had it.
        counts: Whether whole numbers count batches, as BatchNorm's do, of which ranks may have had
            fewer than others. They become the largest.

    Raises:
        CheckpointError: They cannot be averaged.
    """
    if not tensors:
        return None
    first = tensors[0]
    if all(torch.equal(each, first) for each in tensors[1:]):
        return first
    if counts and not first.is_floating_point():
        return torch.stack(tensors).amax(0)
    if not first.is_floating_point() or any(each.shape != first.shape for each in tensors):
        raise CheckpointError(
            f"{source.name}: the buffer {name} differs between the {source.world_size} ranks that "
            "wrote it, and is of whole numbers or of several shapes, which have no mean. Resume on "
            f"{source.world_size} ranks."
        )
    return torch.stack([each.double() for each in tensors]).mean(0).to(first.dtype)


def _put(slot: Slot, value: Tensor | None, device: torch.device) -> None:
    buffer = slot.buffer
    if value is None or buffer is None or buffer.shape != value.shape or _overlaps(buffer):
        where = device if buffer is None else buffer.device
        slot.put(None if value is None else value.to(where))
    else:
        buffer.copy_(value)


def _overlaps(tensor: Tensor) -> bool:
    """Return whether several elements lie in one place, as in an expanded tensor."""
    pairs = zip(tensor.stride(), tensor.shape, strict=True)
    return any(stride == 0 and size > 1 for stride, size in pairs)


def _stateful(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules that have extra state, by name."""
    for name, module in model.named_modules():
        if type(module).get_extra_state is not nn.Module.get_extra_state:
            yield plain_name(f"{name}.").removesuffix("."), module


def check_extra_state(model: nn.Module) -> None:
    """Refuse extra state that a readable file cannot hold.

    Raises:
        TrainingError: `get_extra_state` of a module returns something else than tensors, numbers,
            texts, lists, and dicts with texts as keys.
    """
    for name, module in _stateful(model):
        if refused := _refused_type(module.get_extra_state()):
            raise TrainingError(
                f"get_extra_state of {name or 'the model'} returns a {refused}. Checkpoints hold "
                "tensors, numbers, texts, lists, and dicts with texts as keys: return these."
            )


def _refused_type(value: Any) -> str | None:
    """Return the name of a type in a value that JSON and tensors cannot hold, if there is any."""
    if isinstance(value, dict) and all(isinstance(key, str) for key in value):
        return next(filter(None, map(_refused_type, value.values())), None)
    if isinstance(value, (list, tuple)):
        return next(filter(None, map(_refused_type, value)), None)
    return None if isinstance(value, Tensor) or is_plain(value) else type(value).__name__


def gather_extra_state(model: nn.Module, gather: Gather) -> dict[str, Any]:
    """Return the extra state of all ranks, the same on every rank (collective)."""
    if not any(True for _ in _stateful(model)):
        return {}
    own = {name: _encoded(module.get_extra_state()) for name, module in _stateful(model)}
    texts = gather({name: json.dumps(each) for name, each in own.items()})
    kept: dict[str, Any] = {}
    for name, text in texts[0].items():
        if all(of_rank.get(name) == text for of_rank in texts):
            kept[f"extra/{name}"] = json.loads(text)
        else:
            of_ranks = ((f"extra/{name}@{rank}", each[name]) for rank, each in enumerate(texts))
            kept |= {full: json.loads(each) for full, each in of_ranks}
    return kept


def read_extra_state(model: nn.Module, source: StateSource, rank: int, world_size: int) -> None:
    """Give each module its extra state.

    Modules whose state the checkpoint lacks are left as they are; `lacks_extra_state` names them.

    Raises:
        CheckpointError: The ranks that wrote it had other states each, and were of another number.
    """
    kept = source.values.get("extra", {})
    for name, module in _stateful(model):
        common, own = f"extra/{name}", f"extra/{name}@{rank}"
        if common in kept:
            module.set_extra_state(_decoded(kept[common]))
        elif own in kept and world_size == source.world_size:
            module.set_extra_state(_decoded(kept[own]))
        elif f"extra/{name}@0" in kept:
            raise CheckpointError(
                f"{source.name}: get_extra_state of {name or 'the model'} returned something else "
                f"on each of the {source.world_size} ranks that wrote it. Resume on "
                f"{source.world_size} ranks."
            )


def lacks_extra_state(model: nn.Module, source: StateSource) -> list[str]:
    """Return the modules whose extra state the checkpoint does not hold."""
    kept = {full.partition("@")[0] for full in source.values.get("extra", {})}
    return [name or "the model" for name, _ in _stateful(model) if f"extra/{name}" not in kept]


def _encoded(value: Any) -> Any:
    if isinstance(value, Tensor):
        data = safetensors.torch.save({"value": value.detach().cpu().contiguous()})
        return {_TENSOR: base64.b64encode(data).decode()}
    if isinstance(value, dict):
        return {key: _encoded(each) for key, each in value.items()}
    return [_encoded(each) for each in value] if isinstance(value, (list, tuple)) else value


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        if value.keys() == {_TENSOR}:
            return safetensors.torch.load(base64.b64decode(value[_TENSOR]))["value"]
        return {key: _decoded(each) for key, each in value.items()}
    if isinstance(value, list):
        return [_decoded(each) for each in value]
    return value
