"""A check that all ranks gather weights in the same order, under FSDP and ZeRO-3.

Under FSDP the ranks gather the weights of a block together, and under ZeRO-3 the weights of each
module, once in forward and again in backward. A rank that skips a module gathers different weights
than the other ranks; it then computes with a mixture of both, or waits forever. In the first passes
the ranks compare each call before they gather anything. Later they compare a checksum of their
calls, which travels with the metrics of the step.
"""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from launcher.engine.backends.recipe_forward import PREFIX
from launcher.engine.state.compiled import is_compiled
from launcher.errors import RecipeError, TrainingError

_WATCHED_PASSES = 16
"""Number of passes, forward and backward, in which ranks compare every call (about 0.1 ms each)."""

_END = -1
"""The value that marks the end of a pass among the indices of modules."""

_CHECKSUM_MASK = 0xFFFF
"""Checksums have 16 bits, so the sum of their squares is exact in float64 on up to 2**21 ranks."""

_MAX_RECORDED_CALLS = 4096
"""Number of recent calls that a rank records, to report where ranks differ."""

_REMEDY = (
    "Call the module on every rank, and multiply its output by 0 where it is not needed; or use "
    "strategy=ddp, zero1 or zero2, which give unused parameters gradients of zeros."
)


def watch_call_order(
    model: nn.Module,
    units: Sequence[nn.Module],
    *,
    strategy: str,
    device: torch.device,
    first: bool,
) -> CallOrder | None:
    """Return a `CallOrder` that watches `units`, or None if a module is compiled.

    torch.compile would trace the hooks of a compiled module. The arguments are those of
    `CallOrder`.
    """
    if is_compiled(model):
        return None
    return CallOrder(model, units, strategy=strategy, device=device, first=first)


class CallOrder:
    """Compares across ranks the order in which modules gather weights, in forward and backward.

    Args:
        model: The prepared model, whose own hooks gather weights.
        units: The modules whose weights are gathered when they are called.
        strategy: The name of the strategy, for error messages.
        device: The device of the tensors that ranks exchange.
        first: Whether the hooks on outputs must run before the module's own. True for FSDP2, which
            gathers in such a hook; False for DeepSpeed, which wraps the outputs.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        *,
        strategy: str,
        device: torch.device,
        first: bool,
    ) -> None:
        names = {module: name for name, module in model.named_modules()}
        self._keeps_first = units[0] is model
        """Whether the weights of the first unit stay gathered from forward to backward, and those
        of others can be gathered several times, as under FSDP."""
        self._is_outside_backward = not self._keeps_first
        """Whether a backward now would be one of forward or loss, which ZeRO-3 refuses."""
        self._names = [_name(names.get(unit, "")) for unit in units]
        self._strategy, self._device = strategy, device
        self._remaining_comparisons = _WATCHED_PASSES * (len(units) + 1)
        self._calls: deque[int] = deque(maxlen=_MAX_RECORDED_CALLS)
        self._checksum = 0
        for index, unit in enumerate(units):
            unit.register_forward_pre_hook(self._forward_pre_hook(index), prepend=True)
            unit.register_forward_hook(self._forward_hook(index), prepend=first)
        model.register_forward_hook(lambda *_: self.end_pass())

    def _forward_pre_hook(self, index: int) -> Callable[[nn.Module, Any], None]:
        return lambda *_: self._record(index)

    def _forward_hook(self, index: int) -> Callable[[nn.Module, Any, Any], None]:
        """Return a hook that records the module's backward when its output gets a gradient."""
        backward_call = index + len(self._names)
        frees = index > 0 or not self._keeps_first

        def begin_backward(_: Tensor) -> None:
            # In a backward, gradients are enabled with create_graph=True alone.
            if frees and (torch.is_grad_enabled() or self._is_outside_backward):
                raise self._own_gradients_error(index)
            self._record(backward_call)

        def watch_backward(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(begin_backward)
                    return

        return watch_backward

    def _own_gradients_error(self, index: int) -> RecipeError:
        return RecipeError(
            "Forward or loss computes gradients itself, as torch.autograd.grad does with "
            f"create_graph=True for a gradient penalty, and strategy={self._strategy} frees the "
            f"weights of {self._names[index]} after that, so that the backward of the step would "
            "compute with freed memory. Use strategy=ddp, zero1 or zero2."
        )

    def _record(self, call: int) -> None:
        """Record a call; in the first passes, compare it with the other ranks' calls before."""
        self._compare(call)
        self._calls.append(call)
        self._checksum = zlib.crc32(call.to_bytes(4, "little"), self._checksum)

    def begin_backward(self) -> None:
        """Begin the backward pass of the loss."""
        self._is_outside_backward = False

    def end_pass(self) -> None:
        """Record the end of a forward or backward pass on this rank (collective).

        Raises:
            RecipeError: Another rank calls a module instead of ending the pass.
        """
        self._compare(_END)
        self._is_outside_backward = not self._keeps_first

    def _compare(self, call: int) -> None:
        """Check, during the first passes, that every rank makes the same call (collective).

        Raises:
            RecipeError: Another rank makes a different call; the message names both modules.
        """
        if self._remaining_comparisons <= 0:
            return
        self._remaining_comparisons -= 1
        local = torch.tensor([call], device=self._device)
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local)
        calls = [int(tensor) for tensor in gathered]
        if difference := self._first_difference([[rank_call] for rank_call in calls]):
            raise RecipeError(
                f"The ranks call different modules in a step: {difference}. With "
                f"strategy={self._strategy}, all ranks gather the weights of a module together. "
                f"{_REMEDY}"
            )

    def _first_difference(self, calls: list[list[int]]) -> str:
        """Describe the first call of a rank that differs from rank 0's; empty if all are equal."""
        for rank, rank_calls in enumerate(calls):
            for one, other in zip_longest(calls[0], rank_calls, fillvalue=_END):
                if one != other:
                    return f"rank 0 {self._describe(one)} where rank {rank} {self._describe(other)}"
        return ""

    def _describe(self, call: int) -> str:
        if call == _END:
            return "ends the pass"
        num_modules = len(self._names)
        text = f"calls {self._names[call % num_modules]}"
        return f"{text} in backward" if call >= num_modules else text

    def take_checksum(self) -> int:
        """Return a 16-bit checksum of this rank's calls since the last time, and reset it."""
        checksum, self._checksum = self._checksum & _CHECKSUM_MASK, 0
        return checksum

    def clear(self) -> None:
        """Clear the recorded calls, after the ranks' checksums were found to be equal."""
        self._calls.clear()

    def difference_error(self, gather: Callable[[Any], list[Any]]) -> TrainingError:
        """Return the error to raise when the ranks' checksums differ (collective)."""
        calls = gather(list(self._calls))
        difference = self._first_difference(calls) or "their checksums differ"
        return TrainingError(
            f"The ranks called different modules in a recent step: {difference}. With "
            f"strategy={self._strategy}, all ranks gather the weights of a module together, so the "
            f"last steps are wrong. {_REMEDY}"
        )


def _name(name: str) -> str:
    """Return the name of a module inside the recipe's own module."""
    is_model = f"{name}." == PREFIX or not name
    return "the model" if is_model else name.removeprefix(PREFIX)
