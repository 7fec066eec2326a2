"""Records the tensor operations of a model function, without computing them.

The function runs as usual, but every new tensor is on the meta device, so it has a shape and no
memory. `Recording` holds the operations in their order, and `replay.py` computes them later, one
parameter at a time. The idea is that of torchdistX's deferred initialisation.

A tensor argument of an operation is described by its storage and its view of it, so operations that
only make views need no replay. Tensors that have values, from NumPy or a file, are kept as they
are. A value that the function asks for, such as `x.item()`, is computed at once if no random number
contributes to it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch._C import DisableTorchFunction
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map, tree_map_only

from launcher.engine.model.apparent_device import CannotDeferError, CpuInPlaceOfMeta
from launcher.engine.model.generator_states import GeneratorTokens, StateChange

_COPIED_BYTES = 1 << 20
"""Size up to which a tensor with values is copied when it is recorded, because the function may
change it later. The function may not change a larger one."""

_UNINITIALISED = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_OVERWRITING = {
    "bernoulli_",
    "cauchy_",
    "copy_",
    "exponential_",
    "fill_",
    "geometric_",
    "log_normal_",
    "normal_",
    "random_",
    "uniform_",
    "zero_",
}
"""In-place operations whose result does not depend on the previous values."""

_RUNNING_STATISTICS = {"native_batch_norm": (3, 4), "cudnn_batch_norm": (3, 4)}
"""The arguments that an operation changes without a note in its schema."""


class View(NamedTuple):
    """A recorded tensor: a view of a storage."""

    storage: int
    """The number of the storage."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype

    def of(self, storage: torch.UntypedStorage) -> Tensor:
        """Return this view of a storage with values."""
        empty = torch.empty(0, dtype=self.dtype)
        return empty.set_(storage, self.offset, self.size, self.stride)


@dataclass(frozen=True, kw_only=True)
class Constant:
    """A tensor with values as an argument of a recorded operation."""

    tensor: Tensor
    original: Tensor
    version: int
    """The version of the original when it was recorded; torch counts the changes of a tensor."""


@dataclass(frozen=True, kw_only=True, eq=False)
class Operation:
    """A recorded operation."""

    function: Any
    arguments: tuple[Any, ...]
    """The positional arguments, with a `View` or a `Constant` for each tensor."""

    options: dict[str, Any]
    """The keyword arguments, in the same form."""

    results: tuple[View | None, ...]
    """The tensors among the results."""

    created: frozenset[int]
    """The storages that it creates."""

    changed: frozenset[int]
    """The storages that it changes."""

    overwritten: frozenset[int]
    """The changed storages of which all previous values are lost."""

    read: frozenset[int]
    """The storages on whose values it depends."""

    draw: int | None
    """Its number among the operations that draw random numbers; None if it draws none."""

    generator: torch.Generator | None
    """The generator that it draws from; None is torch's default generator."""

    @property
    def touched(self) -> frozenset[int]:
        """Return all storages that it uses."""
        return self.created | self.changed | self.read


@dataclass(kw_only=True)
class Recording:
    """The recorded operations of a model function."""

    operations: list[Operation | StateChange] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    """The number of bytes of each storage."""

    storages: list[torch.UntypedStorage] = field(default_factory=list)
    """The storages on the meta device, which are kept so that none gets the address of another."""

    tokens: GeneratorTokens = field(default_factory=GeneratorTokens)
    _numbers: dict[int, int] = field(default_factory=dict)
    """The number of each storage by its address."""

    def storage_of(self, tensor: Tensor) -> int:
        """Return the number of the storage of a tensor on the meta device, which may be new."""
        storage = tensor.untyped_storage()
        address = storage._cdata  # noqa: SLF001
        if address not in self._numbers:
            self._numbers[address] = len(self.storages)
            self.storages.append(storage)
            self.sizes.append(storage.nbytes())
        return self._numbers[address]

    def knows(self, tensor: Tensor) -> bool:
        """Return whether a tensor on the meta device has been recorded."""
        return tensor.untyped_storage()._cdata in self._numbers  # noqa: SLF001

    def view_of(self, tensor: Tensor) -> View:
        """Return the description of a tensor on the meta device.

        Raises:
            CannotDeferError: The tensor is sparse, or a conjugate.
        """
        if tensor.layout != torch.strided or tensor.is_conj() or tensor.is_neg():
            raise CannotDeferError("it makes a sparse or conjugate tensor")
        return View(
            self.storage_of(tensor),
            tuple(tensor.shape),
            tensor.stride(),
            int(tensor.storage_offset()),
            tensor.dtype,
        )

    def check_constants(self) -> None:
        """Check that the tensors with values are still as they were when they were recorded.

        Raises:
            CannotDeferError: One of them was changed.
        """
        for operation in self.operations:
            if isinstance(operation, Operation):
                for leaf in tree_flatten((operation.arguments, operation.options))[0]:
                    if isinstance(leaf, Constant) and _version(leaf.original) != leaf.version:
                        raise CannotDeferError("it changes a large tensor after using it")


Compute = Callable[[Recording, View], Tensor | None]
"""Returns the present values of a recorded tensor; None if they depend on random numbers."""


class OperationRecorder(TorchDispatchMode):
    """Records the operations of this thread while it is active.

    Args:
        compute: Computes the values that the function asks for.
    """

    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.recording = Recording()
        self._compute = compute
        self._devices = CpuInPlaceOfMeta(self.values_of)
        self._truncated_normal: Any = None
        self._load: Any = None

    def __enter__(self) -> OperationRecorder:
        super().__enter__()
        self._devices.__enter__()
        # torch's function draws until all values lie within the bounds, and draws nothing on the
        # meta device.
        init: Any = nn.init
        self._truncated_normal = init._no_grad_trunc_normal_
        init._no_grad_trunc_normal_ = self._record_truncated_normal
        self._load, torch.load = torch.load, self._load_values
        return self

    def __exit__(self, *exception: Any) -> None:
        init: Any = nn.init
        init._no_grad_trunc_normal_ = self._truncated_normal
        torch.load = self._load
        self._devices.__exit__(*exception)
        super().__exit__(*exception)

    def _load_values(self, *args: Any, **kwargs: Any) -> Any:
        with _disable_current_modes(), DisableTorchFunction():
            return self._load(*args, **kwargs)

    def _record_truncated_normal(
        self, tensor: Tensor, *args: Any, generator: torch.Generator | None = None, **kwargs: Any
    ) -> Tensor:
        with DisableTorchFunction():
            if not tensor.is_meta:
                raise CannotDeferError("it draws random numbers into a tensor that has values")
            if args and isinstance(args[-1], torch.Generator):
                *args, generator = args  # type: ignore[assignment]
            view = self.recording.view_of(tensor)
            storage = frozenset((view.storage,))
            overwritten = storage if _covers(view, self.recording.sizes) else frozenset()
            change, draw = self.recording.tokens.before_draw(generator)
            self.recording.operations += [] if change is None else [change]
            self.recording.operations.append(
                Operation(
                    function=self._truncated_normal,
                    arguments=(view, *args),
                    options={"generator": generator, **kwargs},
                    results=(),
                    created=frozenset(),
                    changed=storage,
                    overwritten=overwritten,
                    read=storage - overwritten,
                    draw=draw,
                    generator=generator,
                )
            )
        return tensor

    def __torch_dispatch__(
        self, func: Any, types: Sequence[Any], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        with DisableTorchFunction():
            return self._dispatch(func, types, tuple(args), dict(kwargs or {}))

    def values_of(self, tensor: Tensor) -> Tensor:
        """Return a tensor on the CPU with the present values of a recorded tensor.

        Raises:
            CannotDeferError: The values depend on random numbers, which are not drawn yet.
        """
        view = self.recording.view_of(tensor)
        with _disable_current_modes():
            values = self._compute(self.recording, view)
        if values is None:
            raise CannotDeferError("it reads values that depend on random numbers")
        return values

    def _dispatch(
        self, func: Any, types: Sequence[Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        if not isinstance(func, OpOverload) or not all(map(_is_plain, types)):
            raise CannotDeferError(f"it uses {func}, which cannot be recorded")
        leaves = tree_flatten((args, kwargs))[0]
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        device = kwargs.get("device")
        if device is not None and torch.device(device).type not in ("cpu", "meta"):
            raise CannotDeferError(f"it makes tensors on the device {device}")
        is_random = torch.Tag.nondeterministic_seeded in func.tags
        if not any(tensor.is_meta for tensor in tensors):
            if tensors and not is_random:
                return func(*args, **kwargs)  # tensors with values, such as torch.tensor(...)
            if tensors:
                raise CannotDeferError("it draws random numbers into a tensor that has values")
            if not _makes_tensors(func):
                return func(*args, **kwargs)
        takes_device = any(a.name == "device" for a in func._schema.arguments)  # noqa: SLF001
        if takes_device and (device is not None or not tensors):
            kwargs["device"] = torch.device("cpu")
        return self._record(func, args, kwargs, leaves, is_random=is_random)

    def _record(
        self,
        func: Any,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        leaves: list[Any],
        *,
        is_random: bool,
    ) -> Any:
        if func is torch.ops.aten.set_.source_Tensor and all(t.is_meta for t in args):
            return func(*args)  # from here on another view
        written = list(_written_arguments(func, args, kwargs))
        _check_written(func, written)
        recording = self.recording
        views = {
            id(leaf): recording.view_of(leaf)
            for leaf in leaves
            if isinstance(leaf, Tensor) and leaf.is_meta
        }
        num_known = len(recording.storages)
        meta_args, meta_kwargs = tree_map(_on_meta, (args, kwargs))
        try:
            result = func(*meta_args, **meta_kwargs)
        except (NotImplementedError, RuntimeError):
            return self._run_with_values(func, args, kwargs, is_random=is_random)
        results = tree_flatten(result)[0]
        outputs = tuple(
            recording.view_of(value) if isinstance(value, Tensor) else None for value in results
        )
        created = frozenset(v.storage for v in outputs if v and v.storage >= num_known)
        if func._schema.name.removeprefix("aten::") in _UNINITIALISED:  # noqa: SLF001
            return result
        if not written and not created:
            return result  # a view
        changed, overwritten, read = _effects(func, args, written, views, recording.sizes)
        generator = next((leaf for leaf in leaves if isinstance(leaf, torch.Generator)), None)
        draw = None
        if is_random:
            change, draw = recording.tokens.before_draw(generator)
            recording.operations += [] if change is None else [change]

        def describe(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            return views[id(leaf)] if leaf.is_meta else _constant(leaf)

        recording.operations.append(
            Operation(
                function=func,
                arguments=tree_map(describe, args),
                options=tree_map(describe, kwargs),
                results=outputs,
                created=created,
                changed=changed,
                overwritten=overwritten,
                read=read,
                draw=draw,
                generator=generator,
            )
        )
        return result

    def _run_with_values(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *, is_random: bool
    ) -> Any:
        """Return the result of an operation that has no kernel for the meta device.

        Raises:
            CannotDeferError: It changes its arguments, or depends on random numbers.
        """
        schema = func._schema  # noqa: SLF001
        if is_random or any(argument.alias_info for argument in schema.arguments):
            raise CannotDeferError(f"{schema.name} does not work on the meta device")

        def with_values(tensor: Tensor) -> Tensor:
            return self.values_of(tensor) if tensor.is_meta else tensor

        args, kwargs = tree_map_only(Tensor, with_values, (args, kwargs))
        return func(*args, **kwargs)


def _check_written(func: Any, written: list[Tensor]) -> None:
    """Check that the tensors which an operation changes can be changed later.

    Raises:
        CannotDeferError: One has values, or the operation changes its storage.
    """
    if any(not tensor.is_meta for tensor in written):
        raise CannotDeferError("it writes recorded values into a tensor that has values")
    if func._schema.name in ("aten::set_", "aten::resize_", "aten::resize_as_"):  # noqa: SLF001
        raise CannotDeferError("it changes the storage of a tensor")


def _is_plain(kind: Any) -> bool:
    return kind in (Tensor, nn.Parameter, nn.Buffer)


def _makes_tensors(func: Any) -> bool:
    return any("Tensor" in str(result.type) for result in func._schema.returns)  # noqa: SLF001


def _written_arguments(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Iterator[Tensor]:
    """Yield the tensors that an operation changes."""
    schema = func._schema  # noqa: SLF001
    statistics = _RUNNING_STATISTICS.get(schema.name.removeprefix("aten::"), ())
    for place, argument in enumerate(schema.arguments):
        is_written = argument.alias_info is not None and argument.alias_info.is_write
        if is_written or place in statistics:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from (leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))


def _effects(
    func: Any,
    args: tuple[Any, ...],
    written: list[Tensor],
    views: dict[int, View],
    sizes: list[int],
) -> tuple[frozenset[int], frozenset[int], frozenset[int]]:
    """Return the storages that an operation changes, those that it overwrites, and those it reads.

    A storage that is changed in part counts as read, because the other values stay.
    """
    changed = frozenset(views[id(tensor)].storage for tensor in written)
    read = frozenset(view.storage for view in views.values())
    overwritten: frozenset[int] = frozenset()
    name = func._schema.name.removeprefix("aten::")  # noqa: SLF001
    if name in _OVERWRITING and _covers(views[id(args[0])], sizes):
        target = views[id(args[0])]
        if sum(view.storage == target.storage for view in views.values()) == 1:
            overwritten = frozenset((target.storage,))
    return changed, overwritten, read - overwritten


def _covers(view: View, sizes: list[int]) -> bool:
    """Return whether a view has each element of its storage once."""
    if math.prod(view.size) * view.dtype.itemsize != sizes[view.storage]:
        return False
    expected = 1
    for stride, size in sorted(zip(view.stride, view.size, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _on_meta(leaf: Any) -> Any:
    """Return an argument for an operation on the meta device."""
    if isinstance(leaf, torch.Generator):
        return None
    if isinstance(leaf, torch.device):
        return torch.device("meta")
    if isinstance(leaf, Tensor) and not leaf.is_meta:
        return torch.empty_strided(leaf.shape, leaf.stride(), dtype=leaf.dtype, device="meta")
    return leaf


def _version(tensor: Tensor) -> int:
    return tensor._version  # noqa: SLF001


def _constant(tensor: Tensor) -> Constant:
    kept = tensor.detach()
    if kept.nbytes <= _COPIED_BYTES:
        kept = kept.clone()
        return Constant(tensor=kept, original=kept, version=_version(kept))
    return Constant(tensor=kept, original=tensor, version=_version(tensor))
