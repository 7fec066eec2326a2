"""The device of a rank, and copies of batches to it."""

from __future__ import annotations

import contextlib
import functools
import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._distributed_c10d import Store

from launcher.engine.backends.nested_tensors import holds_tensors, map_tensors, tensors_in
from launcher.environment.world import World
from launcher.errors import RecipeError, WorldError
from launcher.planning.plan import Plan
from launcher.printable import kind_of
from launcher.recipe.recipe import Recipe

_MIN_CAPABILITY_BF16 = (8, 0)
_MIN_CAPABILITY_COMPILE = (7, 0)
"""The lowest CUDA compute capabilities that support each feature."""


_REMEDY = "Return tensors in a list, tuple, dict or dataclass from the data or its collate function"


class Placement:
    """Copies batches to one device.

    On CUDA the copies run on a separate stream. From pinned memory they overlap with the
    computation of the previous micro-batch, and the compute stream waits for them, not the host.
    The host runs one micro-batch ahead of the device and no further, so that the memory that is in
    use does not depend on which of them is faster.

    Args:
        device: The target device.
        channels_last: Whether to store images, floating-point tensors of shape (N, C, H, W), in
            the memory format (N, H, W, C).
        double: Whether to convert floating-point tensors to float64.
    """

    def __init__(
        self, device: torch.device, *, channels_last: bool = False, double: bool = False
    ) -> None:
        self._device = device
        self._channels_last = channels_last
        self._double = double
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        # Waiting threads sleep: a busy wait would take a core from the DataLoader workers.
        self._run_ahead = RunAhead(functools.partial(torch.cuda.Event, blocking=True))

    def copy(self, batch: Any) -> Any:
        """Return `batch` with its tensors on the device, and converted.

        Tensors are found in lists, tuples, mappings and dataclasses. Objects of other classes are
        moved by their own method `to`.

        Raises:
            RecipeError: An object holds tensors that cannot be moved or converted.
        """
        if self._stream is None:
            is_unchanged = not (self._channels_last or self._double)
            return batch if is_unchanged else map_tensors(self._format, batch, self._convert_object)
        compute_stream = torch.cuda.current_stream(self._device)
        self._run_ahead.limit()
        if any(tensor.device == self._device for tensor in tensors_in(batch)):
            self._stream.wait_stream(compute_stream)  # which may still compute these tensors
        move_object = functools.partial(self._move_object, compute_stream)
        with torch.cuda.stream(self._stream):
            device_batch = map_tensors(self._move, batch, move_object)
        compute_stream.wait_stream(self._stream)
        # The copy stream allocated this memory. The allocator must not reuse it before the compute
        # stream has finished with it.
        for tensor in tensors_in(device_batch):
            tensor.record_stream(compute_stream)
        return device_batch

    def _move(self, tensor: Tensor) -> Tensor:
        return self._format(tensor.to(self._device, non_blocking=True))

    def _move_object(self, compute_stream: torch.cuda.Stream, value: Any) -> Any:
        """Return an object of an unknown class on the device.

        It is copied on the compute stream, because its tensors are not known to this class. The
        host does not wait for the copy if its method `to` has torch's argument `non_blocking`.

        Raises:
            RecipeError: It holds tensors and has no method `to`.
        """
        if callable(getattr(value, "to", None)):
            with torch.cuda.stream(compute_stream):
                value = move_object(value, self._device)
        elif holds_tensors(value):
            raise RecipeError(
                f"A batch holds {kind_of(value)}, whose tensors cannot be moved to a GPU. "
                f"{_REMEDY}, or give {type(value).__name__} a method to(device)."
            )
        return self._convert_object(value)

    def _convert_object(self, value: Any) -> Any:
        """Return an object of an unknown class with float64 tensors, if those are needed.

        Raises:
            RecipeError: It holds tensors and cannot be converted.
        """
        if not self._double or not holds_tensors(value):
            return value
        if callable(getattr(value, "double", None)):
            return value.double()
        raise RecipeError(
            f"A batch holds {kind_of(value)}, whose tensors cannot be converted for "
            f"precision=fp64. {_REMEDY}, or use another precision."
        )

    def _format(self, tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        if self._double:
            tensor = tensor.double()
        if self._channels_last and tensor.ndim == 4:
            return tensor.contiguous(memory_format=torch.channels_last)
        return tensor


def move_object(value: Any, device: torch.device) -> Any:
    """Return `value.to(device)`, asynchronously where the method `to` can, as tensors do."""
    try:
        parameters = inspect.signature(value.to).parameters
    except (TypeError, ValueError):  # a function without a signature
        return value.to(device)
    kinds = {parameter.kind for parameter in parameters.values()}
    if "non_blocking" in parameters or inspect.Parameter.VAR_KEYWORD in kinds:
        return value.to(device, non_blocking=True)
    return value.to(device)


class RunAhead:
    """Lets the host queue work for one micro-batch more than the device has finished.

    Args:
        make_event: Returns an event of a device, such as `torch.cuda.Event`.
    """

    def __init__(self, make_event: Callable[[], Any]) -> None:
        self._make_event = make_event
        self._previous: Any = None

    def limit(self) -> None:
        """Wait until the device has finished all work that was queued before the last call."""
        event = self._make_event()
        event.record()
        if self._previous is not None:
            self._previous.synchronize()
        self._previous = event


def planned_device(recipe: Recipe, plan: Plan, local_rank: int) -> torch.device:
    """Return this rank's device, after making it current and applying the recipe's settings.

    Raises:
        WorldError: torch cannot use the planned GPU, or the GPU lacks a feature that the recipe
            requires.
    """
    if recipe.deterministic:
        use_deterministic_kernels()
    if plan.device == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise WorldError(
            f"The plan needs GPUs, but torch {torch.__version__} finds no usable one. Either torch "
            "is a +cpu build, or the driver is older than its CUDA version requires: see "
            "`nvidia-smi`. To train on CPUs, set device=cpu."
        )
    device = torch.device("cuda", device_index(local_rank, torch.cuda.device_count(), plan))
    torch.cuda.set_device(device)
    set_tf32(enabled=recipe.tf32)
    torch.backends.cudnn.benchmark = recipe.cudnn_benchmark
    name, capability = torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)
    if plan.precision == "bf16" and capability < _MIN_CAPABILITY_BF16:
        raise WorldError(
            f"precision=bf16 needs a GPU of the Ampere generation or newer, but this is a {name}. "
            "Use precision=fp16 or precision=fp32."
        )
    if recipe.compile and capability < _MIN_CAPABILITY_COMPILE:
        raise WorldError(
            f"compile=true needs a GPU of the Volta generation or newer, but this is a {name}. "
            "Use compile=false."
        )
    return device


def use_deterministic_kernels() -> None:
    """Make all later operations of this process repeat their results to the bit, or raise.

    cuBLAS reads its variable when torch creates the first handle, so call this before CUDA is used.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    settings: Any = torch.utils.deterministic
    settings.fill_uninitialized_memory = False  # slow, and nobody reads it
    torch.backends.cudnn.benchmark = False


def set_tf32(*, enabled: bool) -> None:
    """Choose whether matrix products and convolutions of fp32 tensors on CUDA use TF32.

    These are the older names of torch's `fp32_precision` settings. Only they leave both the old and
    the new ones readable, which libraries use (torch 2.13).
    """
    torch.backends.cuda.matmul.allow_tf32 = enabled
    torch.backends.cudnn.allow_tf32 = enabled


def device_index(local_rank: int, num_visible: int, plan: Plan) -> int:
    """Return the index of this rank's GPU among those that it can see.

    A rank that sees one GPU has it to itself: Slurm shows each task its own.

    Raises:
        WorldError: There are too few GPUs.
    """
    if num_visible == 1:
        return 0
    if local_rank >= num_visible:
        raise WorldError(
            f"The plan needs {plan.nproc_per_node} GPUs on this node, but torch finds "
            f"{num_visible}. Use -n {num_visible}."
        )
    return local_rank


def check_own_device(store: Store, world: World, uuid: str) -> None:
    """Refuse a GPU that another rank of this node uses as well (collective on the node).

    The ranks compare their GPUs through the store, because NCCL fails in a group in which two ranks
    have one GPU.

    Args:
        store: The store at which the ranks have met.
        world: This rank.
        uuid: What identifies the GPU of this rank, on whatever index each process sees it.

    Raises:
        WorldError: Two ranks have the same GPU.
    """
    first = world.rank - world.local_rank
    store.set(f"gpu/{world.rank}", uuid)
    others = [rank for rank in range(first, first + world.local_world_size) if rank != world.rank]
    for rank in others:
        if store.get(f"gpu/{rank}").decode() == uuid:
            ranks = " and ".join(map(str, sorted((rank, world.rank))))
            raise WorldError(
                f"Ranks {ranks} use the same GPU ({uuid}). Start one rank for each GPU. With srun, "
                "use --gpus-per-task=1, or --gpus-per-node with as many tasks on a node."
            )


def device_identity(device: torch.device) -> str:
    """Return what identifies a GPU on its node: its UUID and its address on the PCI bus.

    Both are needed: partitions of a GPU may share one of them, and under ROCm a GPU may lack a
    UUID.
    """
    properties = torch.cuda.get_device_properties(device)
    names = ("pci_domain_id", "pci_bus_id", "pci_device_id")
    address = ":".join(f"{getattr(properties, name, 0):02x}" for name in names)
    return f"UUID {getattr(properties, 'uuid', 'unknown')}, PCI {address}"


def device_name(device: torch.device) -> str:
    """Return the name of the GPU, or the model name of the CPU."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return "CPU"
