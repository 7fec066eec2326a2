"""A recorder of the places where the host would wait for a GPU, on a machine without one.

Fake tensors have the device "cuda" and no values: torch follows shapes and types alone. A dispatch
mode above them sees every operation, and records those for which torch waits: reading a number,
operations whose shape depends on values, and copies that are not asynchronous.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

GPU = torch.device("cuda", 0)

_READS = (
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.masked_select.default,
    torch.ops.aten.equal.default,
)


def _like_channels(num: int) -> Callable[..., Any]:
    return lambda x, *_: tuple(x.new_empty(x.size(1)) for _ in range(num))


_KERNELS: dict[Any, Callable[..., Any]] = {
    torch.ops.aten._fused_sgd_.default: lambda *_, **__: None,
    torch.ops.aten.batch_norm_stats.default: _like_channels(2),
    torch.ops.aten.batch_norm_gather_stats_with_counts.default: _like_channels(2),
    torch.ops.aten.batch_norm_elemt.default: lambda x, *_: torch.empty_like(x),
    torch.ops.aten.batch_norm_backward_reduce.default: _like_channels(4),
    torch.ops.aten.batch_norm_backward_elemt.default: lambda x, *_: torch.empty_like(x),
}
"""Operations that fake tensors cannot follow, and functions that return their outputs."""

_COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)


class _Recorder(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.waits: list[str] = []
        self._pinned: list[Tensor] = []

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        options: Mapping[str, Any] = kwargs or {}
        if func is torch.ops.aten._pin_memory.default:  # fake tensors lack it
            copy = args[0].clone()
            self._pinned.append(copy)
            return copy
        if func is torch.ops.aten.is_pinned.default:
            return self._is_pinned(args[0])
        if func in _READS and args[0].device.type == "cuda":
            self._record(func)
            if func is _READS[0]:
                return 1.0 if args[0].is_floating_point() else 1
        if func in _KERNELS:
            return _KERNELS[func](*args, **options)
        if func in _COPIES and self._waits(func, args, options):
            self._record(func)
        return func(*args, **options)

    def _waits(self, func: Any, args: Sequence[Any], options: Mapping[str, Any]) -> bool:
        if func is torch.ops.aten.copy_.default:
            target, source = args[0].device, args[1]
            is_asynchronous = args[2] if len(args) > 2 else options.get("non_blocking", False)
        else:
            source = args[0]
            target = torch.device(options.get("device") or source.device)
            is_asynchronous = options.get("non_blocking", False)
        if target.type == source.device.type:
            return False
        return not is_asynchronous or not (target.type == "cpu" or self._is_pinned(source))

    def _is_pinned(self, tensor: Tensor) -> bool:
        return any(tensor is pinned for pinned in self._pinned)

    def _record(self, func: Any) -> None:
        frames = traceback.extract_stack()
        own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
        self.waits.append(f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line} ({func})")


@contextmanager
def recorded_waits() -> Iterator[list[str]]:
    """Record the waits for tensors on `GPU` that are made and used in the context.

    Gradients are off: autograd needs a real device.

    Yields:
        A list that is filled with the place of each wait.
    """
    recorder = _Recorder()
    with torch.no_grad(), FakeTensorMode(allow_non_fake_inputs=True), recorder:
        yield recorder.waits
