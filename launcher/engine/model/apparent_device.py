"""Lets tensors on the meta device look as if they were on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._C import DisableTorchFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes


class CannotDeferError(Exception):
    """A model function does something that cannot be recorded; the text says what."""


class CpuInPlaceOfMeta(TorchFunctionMode):
    """Lets recorded tensors look to the model function as if they were on the CPU.

    Args:
        values_of: Returns the values of a recorded tensor.
    """

    def __init__(self, values_of: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._values_of = values_of

    def __torch_function__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "meta":
            raise CannotDeferError("it makes tensors on the meta device")
        first = args[0] if args else None
        if func in _WITH_VALUES and not (isinstance(first, Tensor) and first.is_meta):
            with _disable_current_modes():
                return func(*args, **kwargs)
        if isinstance(first, Tensor) and first.is_meta and func in _HANDLERS:
            return _HANDLERS[func](self, func, *args, **kwargs)
        return func(*args, **kwargs)

    def property_of(self, func: Any, _: Tensor) -> Any:
        """Return a property as that of a tensor on the CPU."""
        return _PROPERTIES[func]

    def read(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return the values of a tensor, as a list or an array that cannot be written to."""
        with DisableTorchFunction():
            result = func(self._values_of(tensor), *args, **kwargs)
        if func is not Tensor.tolist:
            result.setflags(write=False)  # the recorded tensor would not change with it
        return result

    def address(self, _: Any, tensor: Tensor) -> int:
        """Return a number that tells tensors apart as their addresses do."""
        storage: int = tensor.untyped_storage()._cdata  # noqa: SLF001
        return storage + int(tensor.storage_offset()) * tensor.itemsize

    def deep_copy(self, _: Any, tensor: Tensor, memo: dict[int, Any]) -> Tensor:
        """Return a copy of a tensor, as `copy.deepcopy` makes of one with values."""
        if id(tensor) not in memo:
            copy = tensor.detach().clone().requires_grad_(tensor.requires_grad)
            copy.__dict__ = {**tensor.__dict__}
            memo[id(tensor)] = copy
        copied: Tensor = memo[id(tensor)]
        return copied

    def convert(self, func: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Return `tensor.to(...)` without the device, where the tensor seems to be already."""
        if func is Tensor.cpu:
            return tensor
        copies = bool(kwargs.pop("copy", False))
        if args and isinstance(args[0], Tensor):  # to(other)
            args = (args[0].dtype, *args[1:])
        device, dtype, _, memory_format = _parse_to(*args, **kwargs)
        if device is not None and device.type == "meta":
            raise CannotDeferError("it makes tensors on the meta device")
        if device is not None and device.type != "cpu":
            raise CannotDeferError(f"it moves tensors to the device {device}")
        return tensor.to(
            tensor.dtype if dtype is None else dtype, copy=copies, memory_format=memory_format
        )


_PROPERTIES: dict[Any, Any] = {
    Tensor.device.__get__: torch.device("cpu"),
    Tensor.is_meta.__get__: False,  # type: ignore[attr-defined]
    Tensor.is_cpu.__get__: True,  # type: ignore[attr-defined]
}

_HANDLERS: dict[Any, Any] = {
    **dict.fromkeys(_PROPERTIES, CpuInPlaceOfMeta.property_of),
    **dict.fromkeys((Tensor.tolist, Tensor.numpy, Tensor.__array__), CpuInPlaceOfMeta.read),
    **dict.fromkeys((Tensor.to, Tensor.cpu), CpuInPlaceOfMeta.convert),
    Tensor.data_ptr: CpuInPlaceOfMeta.address,
    Tensor.__deepcopy__: CpuInPlaceOfMeta.deep_copy,
}
"""What happens to a recorded tensor in place of some functions."""

_WITH_VALUES = {Tensor.__deepcopy__, torch.asarray, torch.frombuffer, torch.from_file}
"""Functions that make tensors from memory that has values."""

_parse_to = torch._C._nn._parse_to  # noqa: SLF001
