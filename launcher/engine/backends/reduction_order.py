"""One order on all ranks in which ZeRO-1 and ZeRO-2 reduce gradients.

DeepSpeed fills its buckets in the order in which gradients arrive. If ranks use different
parameters in a step, gradients of different parameters end up at the same place in a bucket and are
added up. This module passes gradients to DeepSpeed in an order that all ranks agree on, and passes
zeros for each parameter that a rank did not use.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

_GroupedParameter = tuple[nn.Parameter, int]
"""A parameter and the index of its parameter group."""


class OrderedReduction:
    """Passes gradients to DeepSpeed's optimizer in the same order on every rank.

    A gradient is passed on as soon as all gradients before it have arrived, so communication still
    overlaps with the backward pass. The first backward pass uses the reverse of the model's order;
    later passes use the order in which gradients arrived on rank 0.

    Args:
        zero: DeepSpeed's `DeepSpeedZeroOptimizer`, which is patched in place.
        broadcast: A collective function that returns rank 0's value on every rank.
    """

    def __init__(self, zero: Any, broadcast: Callable[[Any], Any]) -> None:
        self._zero, self._broadcast = zero, broadcast
        self._parameters: list[_GroupedParameter] = [
            (parameter, group_index)
            for group_index, group in enumerate(zero.bit16_groups)
            for parameter in group
            if parameter.requires_grad
        ]
        self._indices = {parameter: index for index, (parameter, _) in enumerate(self._parameters)}
        self._order = list(reversed(range(len(self._parameters))))
        self._order_is_final = False
        self._arrived: list[int] = []
        self._waiting: set[int] = set()
        self._next = 0
        self._reduce = zero.reduce_ready_partitions_and_remove_grads
        self._finish = zero.overlapping_partition_gradients_reduce_epilogue
        self._get_gradient = zero.get_gradient_for_reduction
        zero.get_gradient_for_reduction = self._gradient_or_zeros
        if zero.partition_gradients or zero.overlap_comm:
            zero.reduce_ready_partitions_and_remove_grads = self._receive
            zero.overlapping_partition_gradients_reduce_epilogue = self._end_backward

    def _gradient_or_zeros(self, parameter: nn.Parameter) -> torch.Tensor:
        """Return the gradient of a parameter, or zeros if it has none."""
        gradient = self._get_gradient(parameter)
        if gradient is None:
            parameter.grad = torch.zeros_like(parameter)
            if self._zero.use_grad_accum_attribute:
                self._zero._fill_param_grad_accum_attribute(parameter)  # noqa: SLF001
            gradient = self._get_gradient(parameter)
        return gradient

    def _receive(self, parameter: nn.Parameter, _: int) -> None:
        """Record a gradient that has arrived, and reduce all gradients that are next in order."""
        zero = self._zero
        if not (zero.partition_gradients or zero.is_gradient_accumulation_boundary()):
            return  # the gradient stays with the parameter until the last micro-step
        index = self._indices[parameter]
        self._arrived.append(index)
        self._waiting.add(index)
        while self._next < len(self._order) and self._order[self._next] in self._waiting:
            self._reduce_next()

    def _reduce_next(self) -> None:
        index = self._order[self._next]
        self._next += 1
        self._waiting.discard(index)
        self._reduce(*self._parameters[index])

    def _end_backward(self) -> None:
        """Reduce the remaining gradients; after the first complete pass, fix the order."""
        while self._next < len(self._order):
            self._reduce_next()
        self._finish()
        zero = self._zero
        is_complete = zero.partition_gradients or zero.is_gradient_accumulation_boundary()
        if is_complete and not self._order_is_final:
            arrived = set(self._arrived)
            rest = [index for index in self._order if index not in arrived]
            self._order, self._order_is_final = self._broadcast([*self._arrived, *rest]), True
        self._next, self._arrived = 0, []
