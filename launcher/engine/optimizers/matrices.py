"""The matrices that Muon updates, and the elements of each that this rank has."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from launcher.engine.optimizers.flat import local_of


class Matrix(ABC):
    """A matrix that is updated as a whole.

    Args:
        owner: The tensor in the optimizer's groups, with the gradient and the state: the weight, or
            a flat tensor of parts of many weights.
        shape: The shape of the whole weight; dimensions after the first are columns.
    """

    def __init__(self, owner: Tensor, shape: torch.Size) -> None:
        self.owner, self.shape = owner, shape

    @abstractmethod
    def part(self, tensor: Tensor) -> Tensor:
        """Return this rank's elements of the matrix, as a view of a tensor.

        Args:
            tensor: `owner`, its gradient, or a state of its shape.
        """

    @abstractmethod
    def elements(self, num_ranks: int) -> list[int]:
        """Return how many elements each rank has, if each has consecutive ones in rank order."""


class WeightMatrix(Matrix):
    """A weight: on every rank as a whole, or sharded as FSDP shards it."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__(weight, weight.shape)

    def part(self, tensor: Tensor) -> Tensor:
        return local_of(tensor.detach())

    def elements(self, num_ranks: int) -> list[int]:
        row = self.shape[1:].numel()
        return [rows * row for rows in rows_of_ranks(self.shape[0], num_ranks)]


class FlatWeight(Matrix):
    """A weight of which this rank has consecutive elements in a flat tensor, as under ZeRO.

    Args:
        owner: This rank's flat tensor, of shape (n,).
        shape: The shape of the whole weight.
        position: The index in `owner` of the first of this rank's elements.
        elements: The number of elements on each rank, in rank order.
        rank: This rank.
        device: Where the ranks exchange and compute; `owner` may be offloaded.
    """

    start: int
    """The index in the flattened weight of the first of this rank's elements."""

    def __init__(
        self,
        owner: Tensor,
        shape: torch.Size,
        *,
        position: int,
        elements: tuple[int, ...],
        rank: int,
        device: torch.device,
    ) -> None:
        super().__init__(owner, shape)
        self.device, self._elements, self._position = device, elements, position
        self.start, self._length = sum(elements[:rank]), elements[rank]

    def part(self, tensor: Tensor) -> Tensor:
        return tensor.detach().narrow(0, self._position, self._length)

    def elements(self, num_ranks: int) -> list[int]:
        assert len(self._elements) == num_ranks
        return list(self._elements)


def rows_of_ranks(num_rows: int, num_ranks: int) -> list[int]:
    """Return how many rows of a matrix each rank has under FSDP."""
    share = -(-num_rows // num_ranks)
    return [min(share, max(num_rows - rank * share, 0)) for rank in range(num_ranks)]
