"""The random numbers that torch draws for a batch, drawn again for a part of that batch.

The loss of a batch can be compared with the losses of its halves only if each sample meets the same
random numbers in both. Equal seeds do not give that, because the numbers that a sample gets from a
generator depend on its place in the batch.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class RecordedDraws(TorchDispatchMode):
    """A context that records the random tensors that torch draws in it."""

    def __init__(self) -> None:
        super().__init__()
        self.draws: list[Tensor | None] = []
        """The tensors in the order in which they were drawn; None for a draw of several tensors."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if _is_draw(function):
            self.draws.append(result.clone() if isinstance(result, Tensor) else None)
        return result


class RepeatedDraws(TorchDispatchMode):
    """A context in which a part of a batch gets the random numbers that it got in the batch.

    Args:
        draws: The tensors that were drawn for the whole batch.
        part: The indices of the samples within the batch.
        num_samples: The number of samples in the batch.
    """

    def __init__(self, draws: list[Tensor | None], part: range, num_samples: int) -> None:
        super().__init__()
        self._draws = iter(draws)
        self._part, self._num_samples = part, num_samples
        self.is_held = True
        """Whether all numbers drawn so far were those of the batch."""

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if _is_draw(function):
            drawn = next(self._draws, None)
            held = None
            if drawn is not None and isinstance(result, Tensor):
                held = self._rows_of_part(drawn, result)
            if held is None:
                self.is_held = False
            else:
                result.copy_(held)
        return result

    def _rows_of_part(self, drawn: Tensor, result: Tensor) -> Tensor | None:
        """Return the numbers of this part, or None if it is not known which they are."""
        if drawn.ndim and result.ndim and drawn.shape[1:] == result.shape[1:]:
            rows, remainder = divmod(len(drawn), self._num_samples)
            if not remainder and len(result) == rows * len(self._part):
                return drawn[rows * self._part.start : rows * self._part.stop]
        return drawn if drawn.shape == result.shape else None


def _is_draw(function: Callable[..., Any]) -> bool:
    return torch.Tag.nondeterministic_seeded in getattr(function, "tags", ())
