"""Whether all ranks call the same modules in the same order, where weights are gathered that way.

Under FSDP the ranks gather the weights of a block together, under ZeRO-3 those of each module, in
forward and once more in backward. A rank that leaves one out gathers other weights than the rest,
and computes with a mixture of both, or waits for ever. Both are found here: in the first passes
before anything is gathered, and later from a checksum of what each rank has called, which is
compared with the step's numbers.
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

from launcher.engine.state.compiled import is_compiled
from launcher.errors import RecipeError, TrainingError

_WATCHED_PASSES = 16
"""Passes, forward and backward, in which the ranks compare at each module, at about 0.1 ms each."""

_END = -1
"""What stands for the end of a pass, beside the numbers of modules."""

_BITS = 0xFFFF
"""Checksums have 16 bits, so that the sum of their squares is exact in float64 on 2**21 ranks."""

_REMEMBERED = 4096
"""Calls that are kept, to say where ranks differ."""

_REMEDY = (
    "Call it on every rank, and multiply its output by 0 where it is not wanted; or use "
    "strategy=ddp, zero1 or zero2, which give a parameter that a rank did not use a gradient of "
    "zeros."
)


def call_order_of(
    model: nn.Module,
    units: Sequence[nn.Module],
    *,
    strategy: str,
    device: torch.device,
    first: bool,
) -> CallOrder | None:
    """Return what watches `units`; None where a module is compiled, as its hooks would be too.

    The arguments are those of `CallOrder`.
    """
    if is_compiled(model):
        return None
    return CallOrder(model, units, strategy=strategy, device=device, first=first)


class CallOrder:
    """Watches the modules that gather weights, in forward and in backward.

    Args:
        model: The model, already prepared: its hooks gather.
        units: The modules whose weights are gathered when they are called.
        strategy: What a message calls the strategy.
        device: Where tensors lie that the ranks exchange.
        first: Whether a module gathers in a hook on its outputs, before which this has to come
            (FSDP2), rather than in what it wraps around them (DeepSpeed).
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
        self._names = [names.get(unit, "") or "the model" for unit in units]
        self._strategy, self._device = strategy, device
        self._comparisons = _WATCHED_PASSES * (len(units) + 1)
        self._calls: deque[int] = deque(maxlen=_REMEMBERED)
        self._sum = 0
        for number, unit in enumerate(units):
            unit.register_forward_pre_hook(self._before(number), prepend=True)
            unit.register_forward_hook(self._after(number), prepend=first)
        model.register_forward_hook(lambda *_: self.end_pass())

    def _before(self, number: int) -> Callable[[nn.Module, Any], None]:
        return lambda *_: self._note(number)

    def _after(self, number: int) -> Callable[[nn.Module, Any, Any], None]:
        """Return a hook that has the module's backward noted when its output gets a gradient."""
        backward = number + len(self._names)

        def called(_: nn.Module, __: Any, output: Any) -> None:
            for tensor in tree_leaves(output):
                if isinstance(tensor, Tensor) and tensor.requires_grad:
                    tensor.register_hook(lambda _: self._note(backward))
                    return

        return called

    def _note(self, number: int) -> None:
        """Note a call, and compare it with that of the other ranks in the first passes."""
        self._compare(number)
        self._calls.append(number)
        self._sum = zlib.crc32(number.to_bytes(4, "little"), self._sum)

    def end_pass(self) -> None:
        """Note that a forward or a backward pass has come to its end on this rank (collective).

        Raises:
            RecipeError: Other ranks have not: they call a module.
        """
        self._compare(_END)

    def _compare(self, number: int) -> None:
        """Refuse to go on where another rank calls something else (collective).

        Raises:
            RecipeError: It names the modules.
        """
        if self._comparisons <= 0:
            return
        self._comparisons -= 1
        own = torch.tensor([number], device=self._device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        numbers = [int(each) for each in everyone]
        if said := self._first_difference([[each] for each in numbers]):
            raise RecipeError(
                f"In a step {said}. With strategy={self._strategy} all ranks gather the weights "
                f"of a module together. {_REMEDY}"
            )

    def _first_difference(self, calls: list[list[int]]) -> str:
        """Return where the calls of a rank begin to differ from rank 0's, or an empty text."""
        for rank, of_rank in enumerate(calls):
            for one, other in zip_longest(calls[0], of_rank, fillvalue=_END):
                if one != other:
                    return f"rank 0 {self._doing(one)} where rank {rank} {self._doing(other)}"
        return ""

    def _doing(self, number: int) -> str:
        if number == _END:
            return "has come to the end"
        count = len(self._names)
        called = f"calls {self._names[number % count]}"
        return f"{called} in backward" if number >= count else called

    def take_checksum(self) -> int:
        """Return a checksum of what this rank has called since the last time."""
        taken, self._sum = self._sum & _BITS, 0
        return taken

    def forget(self) -> None:
        """Forget the calls, which were the same on all ranks."""
        self._calls.clear()

    def difference(self, gather: Callable[[Any], list[Any]]) -> TrainingError:
        """Return the error of ranks whose checksums differ (collective)."""
        said = self._first_difference(gather(list(self._calls))) or "ranks call other modules"
        return TrainingError(
            f"In a recent step {said}. With strategy={self._strategy} all ranks gather the weights "
            f"of a module together, so the last steps are wrong. {_REMEDY}"
        )
