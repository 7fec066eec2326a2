"""Whether all ranks call the same modules in the same order, where weights are gathered that way.

Under FSDP the ranks gather the weights of a block together, under ZeRO-3 those of each module. A
rank that leaves one out gathers other weights than the rest, and computes with a mixture of both,
or waits for ever. Both are found here: in the first forward passes before anything is gathered, and
later from a checksum of what each rank has called, which is compared with the step's numbers.
"""

from __future__ import annotations

import zlib
from array import array
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch._dynamo import OptimizedModule

from launcher.errors import RecipeError, TrainingError

_WATCHED_PASSES = 16
"""Forward passes in which the ranks compare before each module, at about 0.1 ms each."""

_END = -1
"""What stands for the end of a forward pass, beside the numbers of modules."""

_BITS = 0xFFFF
"""Checksums have 16 bits, so that the sum of their squares is exact in float64 on 2**21 ranks."""

_REMEDY = (
    "Call it on every rank, and multiply its output by 0 where it is not wanted; or use "
    "strategy=ddp, zero1 or zero2, which give a parameter that a rank did not use a gradient of "
    "zeros."
)


def lockstep_of(
    model: nn.Module, units: Sequence[nn.Module], *, strategy: str, device: torch.device
) -> Lockstep | None:
    """Return what watches `units`; None where a module is compiled, as its hooks would be too."""
    for module in model.modules():
        if isinstance(module, OptimizedModule) or module._compiled_call_impl:  # noqa: SLF001
            return None
    return Lockstep(model, units, strategy=strategy, device=device)


class Lockstep:
    """Watches the modules that gather weights.

    Args:
        model: The model, already prepared: its hooks gather.
        units: The modules whose weights are gathered when they are called.
        strategy: What a message calls the strategy.
        device: Where tensors lie that the ranks exchange.
    """

    def __init__(
        self,
        model: nn.Module,
        units: Sequence[nn.Module],
        *,
        strategy: str,
        device: torch.device,
    ) -> None:
        names = {module: name for name, module in model.named_modules()}
        self._names = [names.get(unit, "") or "the model" for unit in units]
        self._strategy, self._device = strategy, device
        self._passes = 0
        self._called: list[int] = []
        self._sum = 0
        self._example: list[int] = []
        for number, unit in enumerate(units):
            unit.register_forward_pre_hook(self._before(number), prepend=True)
        model.register_forward_hook(self._after)

    def _before(self, number: int) -> Callable[[nn.Module, Any], None]:
        def called(_: nn.Module, __: Any) -> None:
            if self._passes < _WATCHED_PASSES:
                self._compare(number)
            self._called.append(number)

        return called

    def _after(self, *_: Any) -> None:
        if self._passes < _WATCHED_PASSES:
            self._compare(_END)
        self._passes += 1
        self._sum = zlib.crc32(array("i", self._called).tobytes(), self._sum)
        self._example, self._called = self._called, []

    def _compare(self, number: int) -> None:
        """Refuse to go on where another rank calls something else (collective).

        Raises:
            RecipeError: It names the modules.
        """
        own = torch.tensor([number], device=self._device)
        everyone = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(everyone, own)
        numbers = [int(each) for each in everyone]
        if said := self._first_difference([[each] for each in numbers]):
            raise RecipeError(
                f"In a forward pass {said}. With strategy={self._strategy} all ranks gather the "
                f"weights of a module together. {_REMEDY}"
            )

    def _first_difference(self, calls: list[list[int]]) -> str:
        """Return where the calls of a rank begin to differ from rank 0's, or an empty text."""
        for rank, of_rank in enumerate(calls):
            for one, other in zip_longest(calls[0], of_rank, fillvalue=_END):
                if one != other:
                    return f"rank 0 {self._doing(one)} where rank {rank} {self._doing(other)}"
        return ""

    def _doing(self, number: int) -> str:
        return "has come to the end" if number == _END else f"calls {self._names[number]}"

    def take_checksum(self) -> int:
        """Return a checksum of what this rank has called since the last time."""
        taken, self._sum = self._sum & _BITS, 0
        return taken

    def difference(self, gather: Callable[[Any], list[Any]]) -> TrainingError:
        """Return the error of ranks whose checksums differ (collective)."""
        said = self._first_difference(gather(self._example)) or "other ranks call other modules"
        return TrainingError(
            f"In a recent forward pass {said}. With strategy={self._strategy} all ranks gather the "
            f"weights of a module together, so the last steps are wrong. {_REMEDY}"
        )
