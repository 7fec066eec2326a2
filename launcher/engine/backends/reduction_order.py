"""The order in which ZeRO-1 and ZeRO-2 reduce gradients, the same on every rank.

DeepSpeed fills its buckets in the order in which gradients arrive. Where ranks use other parameters
in a step, other gradients then lie at the same place in a bucket, and are added up. Here gradients
are handed on in one order that all ranks have agreed on, and one of zeros stands for each parameter
that a rank has not used.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_Item = tuple[nn.Parameter, int]
"""A parameter and the number of its group."""


class OrderedReduction:
    """Hands gradients to DeepSpeed's optimizer in one order.

    A gradient is handed on as soon as all those before it have arrived, so that communication
    overlaps with the backward pass as before. The order is the reverse of the model's until the
    first backward pass ends, and then the order in which gradients arrived on rank 0.

    Args:
        zero: DeepSpeed's `DeepSpeedZeroOptimizer`, which is changed in place.
        broadcast: Returns rank 0's value on every rank (collective).
    """

    def __init__(self, zero: Any, broadcast: Callable[[Any], Any]) -> None:
        self._zero, self._broadcast = zero, broadcast
        self._items: list[_Item] = [
            (parameter, number)
            for number, group in enumerate(zero.bit16_groups)
            for parameter in group
            if parameter.requires_grad
        ]
        self._places = {parameter: place for place, (parameter, _) in enumerate(self._items)}
        self._order = list(reversed(range(len(self._items))))
        self._agreed = False
        self._arrived: list[int] = []
        self._waiting: set[int] = set()
        self._next = 0
        self._reduce = zero.reduce_ready_partitions_and_remove_grads
        self._finish = zero.overlapping_partition_gradients_reduce_epilogue
        self._gradient_of = zero.get_gradient_for_reduction
        zero.get_gradient_for_reduction = self._gradient
        if zero.partition_gradients or zero.overlap_comm:
            zero.reduce_ready_partitions_and_remove_grads = self._take
            zero.overlapping_partition_gradients_reduce_epilogue = self._end

    def _gradient(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the gradient of a parameter, of zeros where it has none."""
        found = self._gradient_of(parameter)
        if found is None:
            parameter.grad = torch.zeros_like(parameter)
            if self._zero.use_grad_accum_attribute:
                self._zero._fill_param_grad_accum_attribute(parameter)  # noqa: SLF001
            found = self._gradient_of(parameter)
        return found

    def _take(self, parameter: nn.Parameter, _: int) -> None:
        """Take a gradient that has arrived, and hand on those whose turn has come."""
        zero = self._zero
        if not (zero.partition_gradients or zero.is_gradient_accumulation_boundary()):
            return  # it stays with the parameter until the last micro-step
        place = self._places[parameter]
        self._arrived.append(place)
        self._waiting.add(place)
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._hand_on()

    def _hand_on(self) -> None:
        place = self._order[self._next]
        self._next += 1
        self._waiting.discard(place)
        self._reduce(*self._items[place])

    def _end(self) -> None:
        """End a backward pass: hand on the rest, and settle the order the first time."""
        while self._next < len(self._order):
            self._hand_on()
        self._finish()
        zero = self._zero
        complete = zero.partition_gradients or zero.is_gradient_accumulation_boundary()
        if complete and not self._agreed:
            seen = set(self._arrived)
            rest = [place for place in self._order if place not in seen]
            self._order, self._agreed = self._broadcast([*self._arrived, *rest]), True
        self._next, self._arrived = 0, []
