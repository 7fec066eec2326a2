"""Gives the parameters and buffers of a model memory on a device, or takes it away."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def move_to_meta(model: nn.Module) -> None:
    """Replace all parameters and buffers by tensors without values."""
    replace_tensors(
        model, lambda tensor: tensor if tensor.is_meta else torch.empty_like(tensor, device="meta")
    )


def allocate(model: nn.Module, device: torch.device) -> None:
    """Give the tensors that are on the meta device memory on a device; the values are undefined."""
    replace_tensors(
        model, lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor
    )


def show_without_memory(model: nn.Module, device: torch.device) -> None:
    """Move a model on the meta device to another device; only its buffers get memory.

    The elements of a parameter share the memory of one number.
    """
    replace_tensors(
        model,
        lambda tensor: torch.empty_like(tensor, device=device),
        lambda parameter: torch.zeros((), dtype=parameter.dtype, device=device).expand_as(
            parameter
        ),
    )


def allocate_shards(
    model: nn.Module, parameter_device: torch.device, buffer_device: torch.device
) -> None:
    """Give a model that FSDP has sharded on the meta device memory; the values are undefined.

    Args:
        model: The module that FSDP has sharded.
        parameter_device: The device of the shards.
        buffer_device: The device of the buffers, which are not sharded.
    """
    slots: dict[int, list[tuple[nn.Module, str]]] = {}
    buffers = {}
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            if buffer is not None:
                buffers[id(buffer)] = buffer
                slots.setdefault(id(buffer), []).append((module, name))
    model.to_empty(device=parameter_device)  # FSDP takes note of the shards that this makes
    for key, places in slots.items():
        allocated = torch.empty_like(buffers[key], device=buffer_device)
        for module, name in places:
            module._buffers[name] = allocated  # noqa: SLF001


def replace_tensors(
    model: nn.Module,
    change: Callable[[Tensor], Tensor],
    change_parameter: Callable[[Tensor], Tensor] | None = None,
) -> None:
    """Replace the parameters and buffers of a model; a shared one is replaced in all its places.

    The objects stay the same where torch can give them other contents, so that lists of parameters
    which the model keeps stay right.

    Args:
        model: The model.
        change: Returns the replacement of a tensor, or the tensor itself to leave it.
        change_parameter: The same for parameters; None uses `change`.
    """
    replaced: dict[int, Tensor] = {}
    kept = []  # an address must not be used again while `replaced` holds it
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):  # noqa: SLF001
            for name, tensor in tensors.items():
                if tensor is None:
                    continue
                if id(tensor) not in replaced:
                    kept.append(tensor)
                    is_parameter = isinstance(tensor, nn.Parameter)
                    replaced[id(tensor)] = _replacement(
                        tensor, change_parameter or change if is_parameter else change
                    )
                replacement = replaced[id(tensor)]
                if replacement is not tensor:
                    # Some modules, such as LSTM, keep lists of their parameters in __setattr__.
                    setattr(module, name, replacement)


def _replacement(tensor: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
    """Return the tensor with its contents replaced, or else another tensor in its place."""
    before = tensor.detach()
    changed = change(before)
    if changed is before:
        return tensor
    if isinstance(tensor, nn.Parameter):
        changed = nn.Parameter(changed, requires_grad=tensor.requires_grad)
    attributes = dict(tensor.__dict__)
    try:
        torch.utils.swap_tensors(tensor, changed)
    except RuntimeError:  # the tensor has weak references, or an autograd graph holds it
        changed.__dict__.update(attributes)
        return changed
    tensor.__dict__.update(attributes)
    return tensor
