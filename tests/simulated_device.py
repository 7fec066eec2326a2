"""A device of its own for torch, on a machine without a GPU: its tensors compute like a CPU's.

`install` registers the device "simulated" through PrivateUse1, the key that torch keeps for devices
of other packages. Autograd, modules, optimizers and checkpoints treat it as they treat CUDA: it is
not the CPU, backward passes run in a thread of the engine, and operations that mix its tensors with
those of the host are refused.

Its kernels are those of the CPU, and run at once. Copies that a GPU makes asynchronously are late:
until somebody waits for a copy, the target holds NaN, or -1 in integers. The waits of the host are
recorded.

A process that has the device keeps it, so tests use it in a process of their own.
"""

from __future__ import annotations

import contextlib
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, UntypedStorage
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

NAME = "simulated"
DEVICE = torch.device("cpu")
"""The device; `install` sets it, because torch does not know its name before."""

_CPU = torch.device("cpu")
_CPU_KERNELS: Any = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_aten: Any = torch.ops.aten
_MIXING = {"index.Tensor", "index_put_", "_index_put_impl_", "lift_fresh"}
"""Operations that take tensors of the host beside those of the device."""

_READS = {"equal", "nonzero", "masked_select", "_unique2", "is_nonzero", "item"}
"""Operations whose result, or whose result's shape, the host must know."""


@dataclass
class Log:
    """What happened on the device since `clear`."""

    waits: list[str] = field(default_factory=list)
    """The lines, outside of torch, that waited for the device."""

    copies: list[tuple[str, bool]] = field(default_factory=list)
    """(direction, whether the host waited) of each copy: "to device" or "to host"."""

    recorded: int = 0
    """Tensors whose use on another stream was recorded."""

    synchronized: list[str] = field(default_factory=list)
    """The threads that waited for all work of the device."""

    def clear(self) -> None:
        """Forget everything."""
        self.__init__()  # type: ignore[misc]


LOG = Log()


class Stream(torch.Stream):
    """A queue of copies that are made when somebody waits for the stream."""

    pending: list[Callable[[], object]]

    def __new__(cls, device: Any = None, priority: int = 0) -> Stream:
        """Create a stream; the arguments are those of `torch.cuda.Stream`."""
        del device, priority
        stream: Stream = super().__new__(cls, device=torch.device(NAME, 0))
        stream.pending = []
        return stream

    def wait_stream(self, stream: Any) -> None:
        """Let later work of this stream see the finished work of another one."""
        stream.finish()

    def wait_event(self, event: Any) -> None:
        """Let later work of this stream wait until the device has reached a mark."""
        event.wait(self)

    def record_event(self, event: Any = None) -> Any:
        """Return a mark behind all work that is queued in this stream."""
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        """Let the host wait for this stream."""
        _record_wait("synchronize")
        self.finish()

    def finish(self) -> None:
        """Make the copies that are pending."""
        pending, self.pending = self.pending, []
        for copy in pending:
            copy()


class Event:
    """A mark in a stream; the arguments are those of `torch.cuda.Event`."""

    def __init__(self, *, enable_timing: bool = False, blocking: bool = False) -> None:
        del enable_timing, blocking
        self._stream: Stream | None = None
        self._time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        """Put the mark behind all work that is queued."""
        self._stream = stream or MODULE.current_stream()
        self._time = time.perf_counter()

    def elapsed_time(self, later: Event) -> float:
        """Return the milliseconds up to a later mark."""
        return 1000 * (later._time - self._time)

    def synchronize(self) -> None:
        """Let the host wait until the device has reached the mark."""
        if self._stream is not None:
            self._stream.finish()

    def wait(self, stream: Stream | None = None) -> None:
        """Let a stream wait until the device has reached the mark."""
        del stream
        self.synchronize()

    def query(self) -> bool:
        """Return whether the device has reached the mark."""
        return self._stream is None or not self._stream.pending


class Module:
    """What `torch.get_device_module` returns for the device: the functions of `torch.cuda`."""

    def __init__(self) -> None:
        self.Stream, self.Event = Stream, Event
        self.generator = torch.Generator()
        self._thread = threading.local()
        self._streams: list[Stream] = []

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None:
        torch.accelerator.set_device_index(device)

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        del device
        return 3 << 30, 4 << 30

    def max_memory_reserved(self, device: Any = None) -> int:
        del device
        return 1 << 30

    def manual_seed(self, seed: int) -> None:
        self.generator.manual_seed(seed)

    manual_seed_all = manual_seed

    def get_rng_state(self, device: Any = None) -> Tensor:
        del device
        return self.generator.get_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        del device
        self.generator.set_state(state)

    def current_stream(self, device: Any = None) -> Stream:
        del device
        stream: Stream | None = getattr(self._thread, "stream", None)
        if stream is None:
            stream = self._thread.stream = self._thread.default = Stream()
            self._streams.append(stream)
        return stream

    def is_on_default_stream(self) -> bool:
        return self.current_stream() is self._thread.default

    @contextlib.contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before = self.current_stream()
        self._streams.append(stream)
        self._thread.stream = stream
        try:
            yield
        finally:
            self._thread.stream = before

    def synchronize(self, device: Any = None) -> None:
        del device
        LOG.synchronized.append(threading.current_thread().name)
        self.finish()

    def finish(self) -> None:
        """Make all pending copies."""
        for stream in self._streams:
            stream.finish()


MODULE = Module()

_Reference: Any = StorageWeakRef

_host: dict[int, tuple[UntypedStorage, Any]] = {}
"""For each storage of the device, the host's storage of the same memory."""

_pinned: dict[int, Any] = {}
"""The storages of the host that are pinned."""

_Library: Any = torch.library.Library
_libraries: list[Any] = []
"""They last as long as the process."""


def install() -> torch.device:
    """Register the device with torch, once in a process, and return it."""
    global DEVICE  # noqa: PLW0603
    _setup_privateuseone_for_python_backend(NAME, backend_module=MODULE)
    DEVICE = torch.device(NAME, 0)
    fallback = _Library("_", "IMPL")
    fallback.fallback(_run, "PrivateUse1")
    kernels = _Library("aten", "IMPL")
    for name, function in (
        ("copy_", _copy),
        ("_local_scalar_dense", _read_number),
        ("record_stream", _record_stream),
    ):
        kernels.impl(name, function, "PrivateUse1")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # they replace kernels
        kernels.impl("_pin_memory", _pin_memory, "CPU")
        kernels.impl("is_pinned", _is_pinned, "CPU")
    _libraries.extend((fallback, kernels))
    factories: Any = _Factories()
    factories.__enter__()  # for the rest of the process
    _patch_resize()
    # An operation with a result of another shape than its kernel's, as torch's own structured
    # kernels call it. On a CPU that is a mistake of the caller.
    warnings.filterwarnings("ignore", message="An output with one or more elements was resized")
    return DEVICE


def host_memory(value: Any) -> Any:
    """Return a tensor of the host with the memory of a tensor of the device; else the value."""
    return _twin(value) if _is_simulated(value) else value


def from_host_memory(tensor: Tensor) -> Tensor:
    """Return a tensor of the device with the memory of a tensor of the host."""
    return _view(_device_storage(tensor.untyped_storage()), tensor)


def _patch_resize() -> None:
    """Let storages of the device be freed, as FSDP does with gathered weights.

    Their memory stays, and holds what no longer is a number.
    """
    resize: Any = UntypedStorage.resize_

    def resize_or_spoil(storage: UntypedStorage, size: int) -> UntypedStorage:
        if storage.device.type != NAME:
            return resize(storage, size)  # type: ignore[no-any-return]
        if size == 0 and storage.nbytes():
            host = _host[storage._cdata][0]
            torch.empty(0, dtype=torch.uint8).set_(host).fill_(255)
        return storage

    UntypedStorage.resize_ = resize_or_spoil  # type: ignore[assignment]


def _is_simulated(value: Any) -> bool:
    return isinstance(value, Tensor) and value.device.type == NAME


def _twin(tensor: Tensor) -> Tensor:
    """Return a tensor of the host with the memory of a tensor of the device."""
    storage = _host[tensor.untyped_storage()._cdata][0]
    twin = torch.empty(0, dtype=tensor.dtype)
    return twin.set_(storage, tensor.storage_offset(), tensor.shape, tensor.stride())


def _device_storage(storage: Any) -> Any:
    """Return a storage of the device with the memory of a storage of the host."""
    result: Any = torch._C._construct_storage_from_data_pointer(
        storage.data_ptr(), torch.device(NAME, 0), storage.nbytes()
    )
    if len(_host) > 10_000:
        for key in [key for key, (_, reference) in _host.items() if reference.expired()]:
            del _host[key]
    _host[result._cdata] = storage, _Reference(result)
    return result


def _view(storage: UntypedStorage, twin: Tensor) -> Tensor:
    """Return a tensor of the device with a storage of the device, and the shape of a twin."""
    tensor: Tensor = torch._C._acc.create_empty_tensor((0,), twin.dtype)
    return _set(tensor, storage, twin)


def _set(tensor: Tensor, storage: UntypedStorage, twin: Tensor) -> Tensor:
    _aten.set_.source_Storage_storage_offset.redispatch(
        _CPU_KERNELS, tensor, storage, twin.storage_offset(), [*twin.shape], [*twin.stride()]
    )
    return tensor


def _run(operation: Any, *args: Any, **kwargs: Any) -> Any:
    """Run any operation on the host's twins of the device's tensors."""
    name = operation.name().removeprefix("aten::")
    twins: list[tuple[Tensor, Tensor]] = []
    _check_devices(name, args, kwargs)
    if name.split(".")[0] in _READS:
        _record_wait(name)

    def to_host(value: Any) -> Any:
        if _is_simulated(value):
            twins.append((_twin(value), value))
            return twins[-1][0]
        is_device = isinstance(value, torch.device) and value.type == NAME
        return _CPU if is_device else value

    host_args, host_kwargs = tree_map(to_host, (args, kwargs))
    if twins and not MODULE.is_on_default_stream():
        MODULE.current_stream().finish()
    if any(argument.name == "generator" for argument in operation._schema.arguments):
        host_kwargs.setdefault("generator", MODULE.generator)
    host_kwargs.pop("pin_memory", None)
    results = operation(*host_args, **host_kwargs)
    storages = {twin.untyped_storage()._cdata: t.untyped_storage() for twin, t in twins}

    def to_device(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        for twin, tensor in twins:
            if value is twin:
                return _with_shape_of(tensor, twin)
        storage = value.untyped_storage()
        return _view(storages.get(storage._cdata) or _device_storage(storage), value)

    return tree_map(to_device, results)


def _with_shape_of(tensor: Tensor, twin: Tensor) -> Tensor:
    """Return a tensor after an operation in place, which may have resized its twin."""
    shapes = [(t.shape, t.stride(), t.storage_offset()) for t in (tensor, twin)]
    if shapes[0] == shapes[1]:
        return tensor
    old, new = tensor.untyped_storage(), twin.untyped_storage()
    is_same = (old.data_ptr(), old.nbytes()) == (new.data_ptr(), new.nbytes())
    return _set(tensor, old if is_same else _device_storage(new), twin)


def _check_devices(name: str, args: Any, kwargs: Any) -> None:
    """Refuse, as CUDA does, tensors of the host beside those of the device."""
    tensors: list[Tensor] = []
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, args)
    tree_map(lambda value: tensors.append(value) if isinstance(value, Tensor) else None, kwargs)
    has_device = any(map(_is_simulated, tensors))
    is_mixed = has_device and any(t.device.type == "cpu" and t.ndim for t in tensors)
    if is_mixed and name not in _MIXING:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {name} got tensors on {NAME}:0 "
            "and cpu."
        )


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    """Copy between the device and the host, or on the device."""
    if _is_simulated(target) and _is_simulated(source):
        if not MODULE.is_on_default_stream():
            MODULE.current_stream().finish()
        _twin(target).copy_(_twin(source))
        return target
    to_device = _is_simulated(target)
    host = source if to_device else target
    is_late = non_blocking and (not to_device or bool(_is_pinned(host)))
    LOG.copies.append(("to device" if to_device else "to host", not is_late))
    twin = _twin(target) if to_device else target
    if not is_late:
        _record_wait("copy")
        MODULE.finish()
        twin.copy_(source if to_device else _twin(source))
        return target
    stream = MODULE.current_stream()
    if to_device and MODULE.is_on_default_stream():  # all later work is behind the copy
        twin.copy_(source)
        return target
    # The device works in order: it copies what its tensor holds now. Pinned memory is read late.
    content = source if to_device else _twin(source).clone()
    twin.fill_(float("nan") if twin.is_floating_point() else -1)
    stream.pending.append(lambda: twin.copy_(content))
    return target


def _read_number(tensor: Tensor) -> Any:
    _record_wait("item")
    MODULE.finish()
    return _twin(tensor).item()


def _record_stream(tensor: Tensor, stream: Any) -> None:
    del tensor, stream
    LOG.recorded += 1


def _pin_memory(tensor: Tensor, device: Any = None) -> Tensor:
    del device
    copy = tensor.clone()
    storage = copy.untyped_storage()
    _pinned[storage._cdata] = _Reference(storage)
    return copy


def _is_pinned(tensor: Tensor, device: Any = None) -> bool:
    del device
    return tensor.untyped_storage()._cdata in _pinned


class _Factories(TorchFunctionMode):
    """Makes tensors in this thread that torch makes for devices written in C++ alone.

    Those are pinned ones, and, below a dispatch mode, those of Python numbers.
    """

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is torch.empty and options.pop("pin_memory", False):
            return func(*args, **options).pin_memory()
        if func is torch.tensor and torch.device(options.get("device") or "cpu").type == NAME:
            return func(*args, **options | {"device": "cpu"}).to(NAME)
        return func(*args, **(kwargs or {}))


def _record_wait(what: str) -> None:
    frames = traceback.extract_stack(sys._getframe(1))
    own = [f for f in frames if "/torch/" not in f.filename and f.filename != __file__]
    where = f"{own[-1].filename}:{own[-1].lineno}: {own[-1].line}" if own else "autograd"
    LOG.waits.append(f"{where} ({what})")
