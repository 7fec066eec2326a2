"""Weights and buffers that a model writes to in its forward pass, on several ranks.

Each rank's forward sees other samples. What it writes, such as running averages, codebooks, queues,
or rows of an embedding that are rescaled, is then another on each rank. BatchNorm's statistics are
averaged (batch_norm.py); the rest is found here, by the tensors' version counters and by the sum of
their bits, and refused by name or brought together as the recipe says.
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
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.state.compiled import is_compiled, plain_name
from launcher.engine.state.module_state import Slot, saved_slots
from launcher.engine.state.training_state import parameters
from launcher.errors import RecipeError
from launcher.planning.strategy import STRATEGIES

_WHOLE_NUMBERS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""Types as which numbers of so many bytes are added up."""


class TensorVersion(NamedTuple):
    """A tensor as it was at some moment."""

    tensor: Tensor | None
    version: int
    total: Tensor | None
    """The sum of its bits, on its device; a write to `tensor.data` shows here alone. None where the
    tensor's content is not there, as of a weight that ZeRO-3 has not gathered."""

    def is_written(self, now: Tensor | None) -> bool:
        """Return whether `now`, in the same place, is another tensor or was written to."""
        return bool(written([("", self, now)]))


def read_version(tensor: Tensor | None) -> TensorVersion:
    """Return what is to be known of a tensor, to see later whether it was written to."""
    if tensor is None:
        return TensorVersion(None, 0, None)
    return TensorVersion(tensor, tensor._version, bit_sum(tensor) if _is_there(tensor) else None)  # noqa: SLF001


def _is_there(tensor: Tensor) -> bool:
    status = getattr(tensor, "ds_status", None)  # of DeepSpeed's, under ZeRO-3
    return status is None or status.name == "AVAILABLE"


@torch.no_grad()
def bit_sum(tensor: Tensor) -> Tensor:
    """Return the sum of a tensor's bits as whole numbers, which no order of adding changes.

    Of a shard it is that of the part on this rank.
    """
    local = tensor.to_local() if isinstance(tensor, DTensor) else tensor
    flat = local.detach().contiguous().reshape(-1)
    if flat.is_complex():
        flat = torch.view_as_real(flat).reshape(-1)
    return flat.view(_WHOLE_NUMBERS[flat.element_size()]).sum(dtype=torch.int64)


def written(places: Iterable[tuple[str, TensorVersion, Tensor | None]]) -> set[str]:
    """Return the names of places where there is another tensor now, or one that was written to."""
    found, totals = set(), []
    for name, before, now in places:
        if now is not before.tensor or (now is not None and now._version != before.version):  # noqa: SLF001
            found.add(name)
        elif now is not None and before.total is not None and _is_there(now):
            totals.append((name, before.total, bit_sum(now)))
    for (name, _, _), differs in zip(totals, _differ(totals), strict=True):
        if differs:
            found.add(name)
    return found


def _differ(totals: list[tuple[str, Tensor, Tensor]]) -> list[bool]:
    """Return whether the two sums of each entry differ, in one look at the device."""
    if not totals:
        return []
    device = totals[0][1].device
    pairs = torch.stack([(one != other).to(device) for _, one, other in totals])
    found: list[bool] = pairs.tolist()
    return found


def own_slots(model: nn.Module) -> dict[str, Slot]:
    """Return the places of saved buffers, less the running statistics of BatchNorm and its kin."""
    return {
        name: slot
        for name, slot in saved_slots(model).items()
        if not isinstance(slot.module, _NormBase)
    }


class Writes:
    """Sees what a model writes to, from the moment at which it is made.

    Args:
        model: The model, its parameters being those that the optimizer knows.
        around_modules: Whether to look around the forward of each module as well. Under FSDP and
            ZeRO-3 the weights that a module computes with exist only while it is called.
    """

    def __init__(self, model: nn.Module, *, around_modules: bool = False) -> None:
        self._weights = {
            name: (each, read_version(each)) for name, each in parameters(model).items()
        }
        self._buffers = {
            name: (slot, read_version(slot.buffer)) for name, slot in own_slots(model).items()
        }
        self._during: set[str] = set()
        self._sums: list[tuple[str, Tensor, Tensor]] = []
        self._handles = list(self._watch(model)) if around_modules else []

    def _watch(self, model: nn.Module) -> Iterator[RemovableHandle]:
        for prefix, module in model.named_modules():
            if any(True for _ in module.parameters()):
                before: list[_Weight] = []
                yield module.register_forward_pre_hook(_Before(before, prefix))
                # Before what is gathered is given up again.
                yield module.register_forward_hook(
                    _After(before, self._during, self._sums), prepend=True
                )

    def stop(self) -> None:
        """Look no longer at modules."""
        for handle in self._handles:
            handle.remove()

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that were written to, by name."""
        places = ((name, before, each) for name, (each, before) in self._weights.items())
        around = zip(self._sums, _differ(self._sums), strict=True)
        names = written(places) | self._during | {name for (name, *_), differs in around if differs}
        return {name: each for name, (each, _) in self._weights.items() if name in names}

    def buffers(self) -> dict[str, Slot]:
        """Return the places of the buffers that were written to or replaced, by name."""
        places = ((name, before, slot.buffer) for name, (slot, before) in self._buffers.items())
        names = written(places)
        return {name: slot for name, (slot, _) in self._buffers.items() if name in names}


class _Weight(NamedTuple):
    """A parameter as it was before a forward."""

    name: str
    module: nn.Module
    key: str
    seen: TensorVersion


class _Before:
    """A hook that sees the weights in a module before its forward, those of its children too."""

    def __init__(self, seen: list[_Weight], prefix: str) -> None:
        self._seen, self._prefix = seen, prefix

    def __call__(self, module: nn.Module, _: Any) -> None:
        self._seen[:] = [
            _Weight(
                plain_name(f"{prefix}.{key}" if prefix else key), child, key, read_version(each)
            )
            for prefix, child in module.named_modules(prefix=self._prefix)
            for key, each in child._parameters.items()  # noqa: SLF001
        ]


class _After:
    """A hook that notes which of them were written to, and sums of bits of the others."""

    def __init__(
        self, seen: list[_Weight], written: set[str], noted: list[tuple[str, Tensor, Tensor]]
    ) -> None:
        self._seen, self._written, self._noted = seen, written, noted

    def __call__(self, *_: Any) -> None:
        for name, module, key, before in self._seen:
            now = module._parameters.get(key)  # noqa: SLF001
            # Another tensor there is one that was gathered or given up meanwhile.
            if now is None or now is not before.tensor:
                continue
            if now._version != before.version:  # noqa: SLF001
                self._written.add(name)
            elif before.total is not None and _is_there(now):
                self._noted.append((name, before.total, bit_sum(now)))


class ForwardWrites:
    """Compares over the ranks what forward passes write, and brings it together.

    It looks in the first two steps, and in those whose number from there is a power of two, so that
    the rest of the run pays nothing.

    Args:
        model: What `Backend.prepare` returned.
        backend: This rank among the others.
        policy: What becomes of buffers that differ: `Recipe.rank_buffers`.
    """

    def __init__(self, model: nn.Module, backend: Backend, policy: str) -> None:
        self._model, self._backend, self._policy = model, backend, policy
        self._sharded = STRATEGIES[backend.plan.strategy].shards_parameters
        self._steps = 0
        self._writes: Writes | None = None
        self._together: dict[str, Slot] = {}

    def begin(self) -> None:
        """Begin a step, before its first forward pass."""
        number, self._steps = self._steps, self._steps + 1
        if self._backend.world_size > 1 and number & (number - 1) == 0:
            module = self._backend.unwrap(self._model)
            # Hooks would have compiled modules compiled again.
            around = self._sharded and not is_compiled(module)
            self._writes = Writes(module, around_modules=around)

    def end(self) -> None:
        """End the passes of a step, before the weights are updated (collective).

        Raises:
            RecipeError: The ranks have written other values, and nothing brings them together.
        """
        writes, self._writes = self._writes, None
        if writes is not None:
            writes.stop()
            self._judge(writes)
        if self._together:
            self._bring_together()

    def taking(self, request: MicroBatchRequest) -> contextlib.AbstractContextManager[None]:
        """Return the context in which a micro-batch of training is taken, forward and backward."""
        return contextlib.nullcontext() if request.counts else self._ignoring_samples()

    @contextlib.contextmanager
    def _ignoring_samples(self) -> Iterator[None]:
        """Leave the buffers that depend on samples as they are, for a micro-batch of weight 0."""
        buffers = {name: slot.buffer for name, slot in self._together.items()}
        kept = {name: each.clone() for name, each in buffers.items() if each is not None}
        try:
            yield
        finally:
            for name, before in kept.items():
                self._together[name].put(before)

    def _judge(self, writes: Writes) -> None:
        module = self._backend.unwrap(self._model)
        slots, own = own_slots(module), parameters(module)
        written_weights = writes.weights()
        # ZeRO keeps its own copy of what it trains, FSDP of all weights: what is written is lost.
        refused = {
            name for name, each in written_weights.items() if each.requires_grad or self._sharded
        }
        values = {
            **({} if self._sharded else own),
            **{name: slot.buffer for name, slot in slots.items()},
        }
        everyone = self._backend.gather((refused, _described(values)))
        if names := sorted(set().union(*(of_rank for of_rank, _ in everyone))):
            raise RecipeError(_of_weights(names))
        described = [of_rank for _, of_rank in everyone]
        differing = sorted(
            name
            for name in set().union(*described)
            if len({of_rank.get(name) for of_rank in described}) > 1
        )
        if names := [name for name in differing if name in own]:
            raise RecipeError(_of_weights(names))
        if differing:
            self._check(differing, slots, described)
            self._together |= {name: slots[name] for name in differing}

    def _check(
        self, names: list[str], slots: dict[str, Slot], described: list[dict[str, Any]]
    ) -> None:
        """Refuse buffers that differ, where the policy does or cannot bring them together."""
        if self._policy == "refuse":
            raise RecipeError(
                f"The model's forward changes the buffer {_some(names)}, and each rank has another "
                "value, because it sees other samples. rank_buffers=average gives every rank their "
                "mean after each step, rank_buffers=broadcast rank 0's. A buffer that need not "
                "be the same on all ranks, nor be saved, takes persistent=False."
            )
        for name in names:
            buffer = slots[name].buffer
            found = [of_rank.get(name) for of_rank in described]
            shapes = {None if each is None else each[1] for each in found}
            whole = buffer is not None and not buffer.is_floating_point()
            if buffer is None or len(shapes) > 1 or (whole and self._policy == "average"):
                what = "whole numbers, which have no mean" if whole else "several shapes"
                raise RecipeError(
                    f"rank_buffers={self._policy} cannot bring the buffer {name} together: it is "
                    f"of {what}, and differs between ranks. Compute it from what all ranks share."
                )

    @torch.no_grad()
    def _bring_together(self) -> None:
        """Give every rank the mean of the ranks' buffers, or those of rank 0 (collective)."""
        buffers = [slot.buffer for slot in self._together.values() if slot.buffer is not None]
        for kind in (torch.float64, torch.int64):
            of_kind = [each for each in buffers if _wide(each) == kind]
            if not of_kind:
                continue
            flat = torch.cat([each.detach().reshape(-1).to(kind) for each in of_kind])
            if self._policy == "broadcast" and self._backend.rank != 0:
                flat.zero_()
            whole = self._backend.sum(flat)
            if self._policy == "average":
                whole = whole / self._backend.world_size
            parts = whole.split([each.numel() for each in of_kind])
            for buffer, value in zip(of_kind, parts, strict=True):
                buffer.copy_(value.view(buffer.shape))


def _wide(tensor: Tensor) -> torch.dtype:
    """Return the type in which a buffer is added up over ranks."""
    return torch.float64 if tensor.is_floating_point() else torch.int64


def _described(
    values: Mapping[str, Tensor | None],
) -> dict[str, tuple[int, tuple[int, ...]] | None]:
    """Return the sum of the bits and the shape of each tensor, in one look at the device."""
    there = {name: each for name, each in values.items() if each is not None}
    sums = [bit_sum(each) for each in there.values()]
    totals = torch.stack([each.to(sums[0].device) for each in sums]).tolist() if sums else []
    found: dict[str, tuple[int, tuple[int, ...]] | None] = dict.fromkeys(values)
    for (name, each), total in zip(there.items(), totals, strict=True):
        found[name] = total, tuple(each.shape)
    return found


def _of_weights(names: list[str]) -> str:
    return (
        f"The model's forward writes to the weight {_some(names)}. Each rank writes what its own "
        "samples ask for, and under FSDP and ZeRO what is written is lost, so the ranks would "
        "train different models. Compute what forward uses from the weight without changing it, "
        "or change it in the optimizer's step. Embedding(max_norm=...) is of this kind: normalise "
        "the rows that were looked up."
    )


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if names[1:] else ""
    return f"{names[0]}{more}"
