"""Detects weights and buffers that forward passes modify, and synchronises buffers over ranks.

Each rank's forward pass processes different samples. The values that it writes, such as running
averages, codebooks, queues or rescaled rows of an embedding, therefore differ between ranks.
BatchNorm's statistics are averaged in batch_norm.py. All other writes are detected here, by the
version counters of tensors and the sums of their bits. They are refused with the tensor's name, or
synchronised as `Recipe.rank_buffers` specifies.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from launcher.engine.backends.base import Backend
from launcher.engine.backends.recipe_forward import PREFIX, RecipeForward
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.state.compiled import is_compiled, plain_name
from launcher.engine.state.module_state import Slot, saved_slots
from launcher.engine.state.training_state import parameters
from launcher.errors import RecipeError
from launcher.planning.strategy import STRATEGIES

_INTEGER_DTYPES = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype for each element size in bytes, in which `bit_sum` adds bits."""


class TensorVersion(NamedTuple):
    """A record of a tensor at one moment, from which a later write can be detected."""

    tensor: Tensor | None
    """The tensor; None for an empty slot."""

    version: int
    """The tensor's version counter."""

    total: Tensor | None
    """The sum of the tensor's bits, on its device, which alone reveals a write to `tensor.data`.
    None if the tensor has no content, such as a weight that ZeRO-3 has not gathered."""

    def is_written(self, now: Tensor | None) -> bool:
        """Return whether `now` is another tensor, or this tensor was written to."""
        return bool(find_written([("", self, now)]))


def read_version(tensor: Tensor | None) -> TensorVersion:
    """Return a record of the tensor, from which a later write can be detected."""
    if tensor is None:
        return TensorVersion(None, 0, None)
    total = bit_sum(tensor) if _has_content(tensor) else None
    return TensorVersion(tensor, tensor._version, total)  # noqa: SLF001


def _has_content(tensor: Tensor) -> bool:
    status = getattr(tensor, "ds_status", None)  # an attribute of DeepSpeed's ZeRO-3 parameters
    return status is None or status.name == "AVAILABLE"


@torch.no_grad()
def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bit patterns as integers, which does not depend on the order.

    For a DTensor, only this rank's shard is added.

    Args:
        tensor: A tensor of any shape, whose elements have 1, 2, 4 or 8 bytes or are complex.

    Returns:
        An int64 scalar on the tensor's device, which wraps on overflow.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = local.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_INTEGER_DTYPES[flat.element_size()]).sum(dtype=torch.int64)


def find_written(entries: Iterable[tuple[str, TensorVersion, Tensor | None]]) -> set[str]:
    """Return the names of tensors that were replaced or written to.

    Args:
        entries: For each name, the record from before and the current tensor.
    """
    names, totals = set(), []
    for name, before, now in entries:
        if now is not before.tensor or (now is not None and now._version != before.version):  # noqa: SLF001
            names.add(name)
        elif now is not None and before.total is not None and _has_content(now):
            totals.append((name, before.total, bit_sum(now)))
    for (name, _, _), differs in zip(totals, _totals_differ(totals), strict=True):
        if differs:
            names.add(name)
    return names


def _totals_differ(totals: list[tuple[str, Tensor, Tensor]]) -> list[bool]:
    """Return whether the two sums of each entry differ, with one read from the device."""
    if not totals:
        return []
    device = totals[0][1].device
    flags = torch.stack([(before != now).to(device) for _, before, now in totals])
    differ: list[bool] = flags.tolist()
    return differ


def slots_without_batch_norm(model: nn.Module) -> dict[str, Slot]:
    """Return the slots of persistent buffers, except those of BatchNorm and similar modules."""
    return {
        name: slot
        for name, slot in saved_slots(model).items()
        if not isinstance(slot.module, _NormBase)
    }


class WriteDetector:
    """Detects which weights and buffers of a model are written to after the detector is created.

    Args:
        model: The model, with the parameters that the optimizer updates.
        around: The wrapped model, to check also before and after the forward of each module, or
            None. Under FSDP and ZeRO-3, the weights with which a module computes exist only during
            its call.
    """

    def __init__(self, model: nn.Module, *, around: nn.Module | None = None) -> None:
        self._weights = {
            name: (weight, read_version(weight)) for name, weight in parameters(model).items()
        }
        self._buffers = {
            name: (slot, read_version(slot.buffer))
            for name, slot in slots_without_batch_norm(model).items()
        }
        self._written_in_modules: set[str] = set()
        self._totals: list[tuple[str, Tensor, Tensor]] = []
        self._handles = [] if around is None else list(self._watch(around))

    def _watch(self, wrapped: nn.Module) -> Iterator[RemovableHandle]:
        (outermost,) = (part for part in wrapped.modules() if isinstance(part, RecipeForward))
        for prefix, module in outermost.named_modules():
            if any(True for _ in module.parameters()):
                weights: list[_WeightRecord] = []
                yield module.register_forward_pre_hook(_RecordWeights(weights, prefix))
                # prepend: this hook must run before the one that frees gathered weights.
                yield module.register_forward_hook(
                    _CompareWeights(weights, self._written_in_modules, self._totals), prepend=True
                )

    def stop(self) -> None:
        """Remove the hooks from the modules."""
        for handle in self._handles:
            handle.remove()

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that were written to, by name."""
        entries = ((name, before, weight) for name, (weight, before) in self._weights.items())
        compared = zip(self._totals, _totals_differ(self._totals), strict=True)
        names = find_written(entries) | self._written_in_modules
        names |= {name for (name, *_), differs in compared if differs}
        return {name: weight for name, (weight, _) in self._weights.items() if name in names}

    def buffers(self) -> dict[str, Slot]:
        """Return the slots of the buffers that were written to or replaced, by name."""
        entries = ((name, before, slot.buffer) for name, (slot, before) in self._buffers.items())
        names = find_written(entries)
        return {name: slot for name, (slot, _) in self._buffers.items() if name in names}


class _WeightRecord(NamedTuple):
    """A parameter of a module and its version before a forward pass."""

    name: str
    module: nn.Module
    key: str
    before: TensorVersion


class _RecordWeights:
    """A forward pre-hook that records the weights of a module and of its children."""

    def __init__(self, records: list[_WeightRecord], prefix: str) -> None:
        self._records, self._prefix = records, prefix

    def __call__(self, module: nn.Module, _: Any) -> None:
        self._records[:] = [
            _WeightRecord(
                plain_name(f"{prefix}.{key}".removeprefix(PREFIX)),
                child,
                key,
                read_version(weight),
            )
            for prefix, child in module.named_modules(prefix=self._prefix)
            for key, weight in child._parameters.items()  # noqa: SLF001
        ]


class _CompareWeights:
    """A forward hook that collects which recorded weights were written to.

    Args:
        records: The records of `_RecordWeights`.
        written: Receives the names of weights whose version counter has changed.
        totals: Receives the sums of bits, before and after, of the other weights.
    """

    def __init__(
        self,
        records: list[_WeightRecord],
        written: set[str],
        totals: list[tuple[str, Tensor, Tensor]],
    ) -> None:
        self._records, self._written, self._totals = records, written, totals

    def __call__(self, *_: Any) -> None:
        for name, module, key, before in self._records:
            now = module._parameters.get(key)  # noqa: SLF001
            # A different tensor is not a write: the weight was gathered or freed in between.
            if now is None or now is not before.tensor:
                continue
            if now._version != before.version:  # noqa: SLF001
                self._written.add(name)
            elif before.total is not None and _has_content(now):
                self._totals.append((name, before.total, bit_sum(now)))


class ForwardWrites:
    """Checks over all ranks what forward passes write, and synchronises buffers that differ.

    It checks the steps 0, 1, 2, 4, 8 and so on, counted from its creation, so that the cost for the
    rest of the run is negligible.

    Args:
        model: The module that `Backend.prepare` returned.
        backend: The backend.
        policy: How to treat buffers that differ between ranks: `Recipe.rank_buffers`.
    """

    def __init__(self, model: nn.Module, backend: Backend, policy: str) -> None:
        self._model, self._backend, self._policy = model, backend, policy
        self._sharded = STRATEGIES[backend.plan.strategy].shards_parameters
        self._num_steps = 0
        self._writes: WriteDetector | None = None
        self._synchronized: dict[str, Slot] = {}

    def begin(self) -> None:
        """Begin a step, before its first forward pass."""
        step, self._num_steps = self._num_steps, self._num_steps + 1
        # A rank with several virtual ranks computes what several ranks would.
        is_shared = self._backend.world_size > 1 or self._backend.virtual_buffers is not None
        if is_shared and step & (step - 1) == 0:
            module = self._backend.unwrap(self._model)
            # Hooks would trigger a recompilation of compiled modules.
            watches_modules = self._sharded and not is_compiled(module)
            self._writes = WriteDetector(module, around=self._model if watches_modules else None)

    def end(self) -> None:
        """Check and synchronise after the last backward pass, before the update (collective).

        Raises:
            RecipeError: The ranks have written different values, and the policy cannot synchronise
                them.
        """
        writes, self._writes = self._writes, None
        if writes is not None:
            writes.stop()
            self._check_writes(writes)
        if self._synchronized:
            self._synchronize()

    def micro_batch_context(
        self, request: MicroBatchRequest
    ) -> contextlib.AbstractContextManager[None]:
        """Return the context for forward and backward of a training micro-batch."""
        return contextlib.nullcontext() if request.has_weight else self._ignoring_samples()

    @contextlib.contextmanager
    def _ignoring_samples(self) -> Iterator[None]:
        """Restore synchronised buffers after a micro-batch of weight 0."""
        buffers = {name: slot.buffer for name, slot in self._synchronized.items()}
        copies = {name: buffer.clone() for name, buffer in buffers.items() if buffer is not None}
        try:
            yield
        finally:
            for name, copy in copies.items():
                self._synchronized[name].put(copy)

    def _check_writes(self, writes: WriteDetector) -> None:
        """Refuse writes to weights, and find the buffers to synchronise (collective).

        Raises:
            RecipeError: A rank wrote to a weight that must not change, or buffers differ between
                ranks and the policy cannot synchronise them.
        """
        module = self._backend.unwrap(self._model)
        if self._backend.virtual_buffers is not None:
            self._check_virtual(writes)
        slots, weights = slots_without_batch_norm(module), parameters(module)
        # ZeRO keeps a copy of trained weights, FSDP of all weights, so writes are lost.
        refused = {
            name
            for name, weight in writes.weights().items()
            if weight.requires_grad or self._sharded
        }
        tensors = {
            **({} if self._sharded else weights),
            **{name: slot.buffer for name, slot in slots.items()},
        }
        gathered = self._backend.gather((refused, _summarize(tensors)))
        if names := sorted(set().union(*(rank_refused for rank_refused, _ in gathered))):
            raise RecipeError(_weight_error(names))
        summaries = [rank_summaries for _, rank_summaries in gathered]
        differing = sorted(
            name
            for name in set().union(*summaries)
            if len({rank_summaries.get(name) for rank_summaries in summaries}) > 1
        )
        if names := [name for name in differing if name in weights]:
            raise RecipeError(_weight_error(names))
        if differing:
            self._check_buffers(differing, slots, summaries)
            self._synchronized |= {name: slots[name] for name in differing}

    def _check_virtual(self, writes: WriteDetector) -> None:
        """Refuse buffers that forward writes to, where a rank computes several virtual ranks.

        Raises:
            RecipeError: A rank wrote to a buffer.
        """
        gathered = self._backend.gather(sorted(writes.buffers()))
        if names := sorted(set().union(*gathered)):
            raise RecipeError(
                f"The model's forward writes to the buffer {shorten(names)}. With virtual_ranks, "
                "only the running statistics of BatchNorm and InstanceNorm belong to a virtual "
                "rank; the values of other buffers would depend on the number of ranks. Compute "
                "the buffer from values that do not depend on the samples, or leave virtual_ranks "
                "out."
            )

    def _check_buffers(
        self, names: list[str], slots: dict[str, Slot], summaries: list[dict[str, Any]]
    ) -> None:
        """Check that the policy can synchronise the buffers that differ between ranks.

        Raises:
            RecipeError: The policy is to refuse such buffers, or a buffer has no mean or several
                shapes.
        """
        if self._policy == "refuse":
            raise RecipeError(
                f"The model's forward changes the buffer {shorten(names)}, and its value differs "
                "between ranks, because each rank processes different samples. Use "
                "rank_buffers=average to give every rank the mean after each step, or "
                "rank_buffers=broadcast to give every rank the value of rank 0. Register a buffer "
                "that may differ between ranks and need not be saved with persistent=False."
            )
        for name in names:
            buffer = slots[name].buffer
            rank_summaries = [summary.get(name) for summary in summaries]
            shapes = {None if summary is None else summary[1] for summary in rank_summaries}
            is_integer = buffer is not None and not buffer.is_floating_point()
            if buffer is None or len(shapes) > 1 or (is_integer and self._policy == "average"):
                reason = (
                    "it holds integers, which have no mean"
                    if is_integer
                    else "its shape differs between ranks"
                )
                raise RecipeError(
                    f"rank_buffers={self._policy} cannot synchronise the buffer {name}, which "
                    f"differs between ranks: {reason}. Compute the buffer from values that all "
                    "ranks share."
                )

    @torch.no_grad()
    def _synchronize(self) -> None:
        """Replace buffers by their mean over ranks, or by those of rank 0 (collective)."""
        buffers = [slot.buffer for slot in self._synchronized.values() if slot.buffer is not None]
        for dtype in (torch.float64, torch.int64):
            group = [buffer for buffer in buffers if _sum_dtype(buffer) == dtype]
            if not group:
                continue
            flat = torch.cat([buffer.detach().reshape(-1).to(dtype) for buffer in group])
            if self._policy == "broadcast" and self._backend.rank != 0:
                flat.zero_()
            result = self._backend.sum(flat)
            if self._policy == "average":
                result = result / self._backend.world_size
            values = result.split([buffer.numel() for buffer in group])
            for buffer, value in zip(group, values, strict=True):
                buffer.copy_(value.view(buffer.shape))


def _sum_dtype(tensor: Tensor) -> torch.dtype:
    """Return the dtype in which a buffer is summed over ranks."""
    return torch.float64 if tensor.is_floating_point() else torch.int64


def _summarize(
    tensors: Mapping[str, Tensor | None],
) -> dict[str, tuple[int, tuple[int, ...]] | None]:
    """Return the sum of bits and the shape of each tensor, with one read from the device."""
    present = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    sums = [bit_sum(tensor) for tensor in present.values()]
    totals = torch.stack([total.to(sums[0].device) for total in sums]).tolist() if sums else []
    summaries: dict[str, tuple[int, tuple[int, ...]] | None] = dict.fromkeys(tensors)
    for (name, tensor), total in zip(present.items(), totals, strict=True):
        summaries[name] = total, tuple(tensor.shape)
    return summaries


def _weight_error(names: list[str]) -> str:
    return (
        f"The model's forward writes to the weight {shorten(names)}. Each rank writes values that "
        "depend on its own samples, and under FSDP and ZeRO the written values are lost, so the "
        "ranks would train different models. Compute what forward needs without changing the "
        "weight, or change the weight in the optimizer's step. Embedding(max_norm=...) also "
        "writes to its weight: normalise the looked-up rows instead."
    )


def shorten(names: list[str]) -> str:
    """Return the first of some names, and how many more there are."""
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{names[0]}{more}"
