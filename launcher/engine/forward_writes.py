"""Weights and buffers that a model writes to in its forward pass, on several ranks.

Each rank's forward sees other samples. What it writes, such as running averages, codebooks, queues,
or rows of an embedding that are rescaled, is then another on each rank. BatchNorm's statistics are
averaged (batch_norm.py); the rest is found here, by the version counters of tensors, and refused by
name or brought together as the recipe says.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.utils.hooks import RemovableHandle

from launcher.engine.backends.base import Backend
from launcher.engine.module_state import Slot, checksum, saved_slots
from launcher.engine.sampler import Request
from launcher.engine.state import parameters, plain_name
from launcher.errors import RecipeError


class Seen(NamedTuple):
    """A tensor as it was at some moment."""

    tensor: Tensor | None
    version: int

    def is_written(self, now: Tensor | None) -> bool:
        """Return whether `now`, in the same place, is another tensor or was written to."""
        return now is not self.tensor or (now is not None and now._version != self.version)  # noqa: SLF001


def see(tensor: Tensor | None) -> Seen:
    """Return what is to be known of a tensor, to see later whether it was written to."""
    return Seen(tensor, 0 if tensor is None else tensor._version)  # noqa: SLF001


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
        self._weights = {name: (each, see(each)) for name, each in parameters(model).items()}
        self._buffers = {name: (slot, see(slot.buffer)) for name, slot in own_slots(model).items()}
        self._during: set[str] = set()
        self._handles = list(self._watch(model)) if around_modules else []

    def _watch(self, model: nn.Module) -> Iterator[RemovableHandle]:
        for prefix, module in model.named_modules():
            if any(True for _ in module.parameters()):
                before: list[_Weight] = []
                yield module.register_forward_pre_hook(_Before(before, prefix))
                # Before what is gathered is given up again.
                yield module.register_forward_hook(_After(before, self._during), prepend=True)

    def stop(self) -> None:
        """Look no longer at modules."""
        for handle in self._handles:
            handle.remove()

    def weights(self) -> dict[str, nn.Parameter]:
        """Return the parameters that were written to, by name."""
        return {
            name: each
            for name, (each, before) in self._weights.items()
            if before.is_written(each) or name in self._during
        }

    def buffers(self) -> dict[str, Slot]:
        """Return the places of the buffers that were written to or replaced, by name."""
        return {
            name: slot
            for name, (slot, before) in self._buffers.items()
            if before.is_written(slot.buffer)
        }


class _Weight(NamedTuple):
    """A parameter as it was before a forward."""

    name: str
    module: nn.Module
    key: str
    seen: Seen


class _Before:
    """A hook that sees the weights in a module before its forward, those of its children too."""

    def __init__(self, seen: list[_Weight], prefix: str) -> None:
        self._seen, self._prefix = seen, prefix

    def __call__(self, module: nn.Module, _: Any) -> None:
        self._seen[:] = [
            _Weight(plain_name(f"{prefix}.{key}" if prefix else key), child, key, see(each))
            for prefix, child in module.named_modules(prefix=self._prefix)
            for key, each in child._parameters.items()  # noqa: SLF001
        ]


class _After:
    """A hook that notes which of them the forward has written to."""

    def __init__(self, seen: list[_Weight], written: set[str]) -> None:
        self._seen, self._written = seen, written

    def __call__(self, *_: Any) -> None:
        for name, module, key, before in self._seen:
            now = module._parameters.get(key)  # noqa: SLF001
            # Another tensor there is one that was gathered or given up meanwhile.
            if now is before.tensor and before.is_written(now):
                self._written.add(name)


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
        self._sharded = backend.plan.strategy in ("fsdp", "zero3")
        self._steps = 0
        self._writes: Writes | None = None
        self._together: dict[str, Slot] = {}

    def begin(self) -> None:
        """Begin a step, before its first forward pass."""
        number, self._steps = self._steps, self._steps + 1
        if self._backend.world_size > 1 and number & (number - 1) == 0:
            # Hooks would have compiled modules compiled again.
            around = self._sharded and not self._backend.recipe.compile
            self._writes = Writes(self._backend.unwrap(self._model), around_modules=around)

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

    def taking(self, request: Request) -> contextlib.AbstractContextManager[None]:
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
        weights, buffers = writes.weights(), writes.buffers()
        trained = {name for name, each in weights.items() if each.requires_grad or self._sharded}
        kept = {name: each for name, each in weights.items() if name not in trained}
        values: dict[str, Tensor | None] = {**kept, **{n: s.buffer for n, s in buffers.items()}}
        own = trained, {name: _described(each) for name, each in values.items()}
        everyone = self._backend.gather(own)
        if refused := sorted(set().union(*(names for names, _ in everyone))):
            raise RecipeError(_of_weights(refused))
        described = [of_rank for _, of_rank in everyone]
        names = {name for of_rank in described for name in of_rank}
        differing = sorted(
            name for name in names if len({of_rank.get(name) for of_rank in described}) > 1
        )
        slots = own_slots(self._backend.unwrap(self._model))
        if refused := [name for name in differing if name not in slots]:
            raise RecipeError(_of_weights(refused))
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
            shapes = {of_rank[name][1] for of_rank in described if name in of_rank}
            whole = buffer is not None and not buffer.is_floating_point()
            if buffer is None or len(shapes) > 1 or (whole and self._policy == "average"):
                what = "whole numbers, which have no mean" if whole else "several shapes"
                raise RecipeError(
                    f"rank_buffers={self._policy} cannot bring the buffer {name} together: it is "
                    f"of {what}, and differs between ranks. Compute it from what all ranks share."
                )

    @torch.no_grad()
    def _bring_together(self) -> None:
        buffers = [slot.buffer for slot in self._together.values() if slot.buffer is not None]
        weight = 1.0 / self._backend.world_size
        if self._policy == "broadcast":
            weight = float(self._backend.rank == 0)
        flat = torch.cat([each.detach().reshape(-1).double() * weight for each in buffers])
        sums = self._backend.sum(flat).split([each.numel() for each in buffers])
        for buffer, value in zip(buffers, sums, strict=True):
            buffer.copy_(value.view(buffer.shape))


def _described(tensor: Tensor | None) -> tuple[int, tuple[int, ...]] | None:
    return None if tensor is None else (checksum(tensor), tuple(tensor.shape))


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
