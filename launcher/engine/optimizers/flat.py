"""`FlatOptimizer`: optimizers that treat each element alike, whatever holds it.

Elements of many weights are updated together, a bounded number at a time, so that the float32
copies with which a step computes need little memory however large the model is. A step uses only
operations that round each result correctly: sums, products, quotients and square roots. Its bits
therefore depend neither on the shards nor on an element's neighbours.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

from launcher.engine.optimizers.rounding import ElementPositions, random_bits, round_to_bfloat16

_ON_CPU, _ON_DEVICE = 1 << 17, 1 << 22
"""Elements that are updated together at most: 0.5 MB in float32 on CPUs, which fits their caches,
and 16 MB on other devices, on which starting a kernel takes as long as computing less."""

WEIGHT, _GRADIENT, STEP = "weight", "gradient", "step"


@dataclass(frozen=True, kw_only=True)
class Piece:
    """Consecutive elements of this rank's shard of a weight."""

    weight: Tensor
    start: int
    stop: int
    positions: ElementPositions


class FlatOptimizer(Optimizer):
    """An optimizer that updates each element by itself, with states in float32 or bfloat16.

    `found_inf`, if it is set to a scalar tensor on the device, skips the step where it is 1. No
    step makes the host wait for the device.

    Args:
        groups: Parameter groups.
        defaults: Values of groups that do not state them.
        state_dtype: The dtype in which states are kept between steps.
        seed: The seed of stochastic rounding.
    """

    state_names: ClassVar[tuple[str, ...]]
    """The states of a weight, each of its shape."""

    scalar_names: ClassVar[tuple[str, ...]] = ()
    """Numbers that are kept with each weight, in float64 on its device, beside the step."""

    found_inf: Tensor | None = None

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        state_dtype: torch.dtype = torch.float32,
        seed: int = 0,
    ) -> None:
        # The count of steps is on the device, as torch's own optimizers with this flag keep it.
        super().__init__(groups, {**defaults, "capturable": True})
        self._state_dtype, self._seed = state_dtype, seed
        self._buckets: list[list[list[Piece]]] | None = None

    @abstractmethod
    def update(
        self, group: Mapping[str, Any], weight: Tensor, gradient: Tensor, *states: Tensor
    ) -> tuple[Tensor, ...]:
        """Return the new weight and states after a step.

        Args:
            group: The parameter group, with `step`: the number of the step, from 1, as a scalar
                tensor in float64.
            weight: Elements of weights, of shape (n,), in float32 or float64; it may be changed.
            gradient: Their gradients, which may be changed.
            *states: Their states in the order of `state_names`, which may be changed.
        """

    def advance(self, group: Mapping[str, Any], scalars: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the new values of the numbers in `scalar_names`, before a step.

        Args:
            group: The parameter group, with `step`.
            scalars: The old values.
        """
        return dict(scalars)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step for all weights.

        Args:
            closure: Not supported; None.
        """
        assert closure is None
        if self._buckets is None:
            self._buckets = [list(self._make_buckets(group)) for group in self.param_groups]
        for group, buckets in zip(self.param_groups, self._buckets, strict=True):
            used = [weight for weight in group["params"] if weight.grad is not None]
            if not used:
                continue
            counts = [self._state_of(weight)[STEP] for weight in used]
            taken = torch.ones_like(counts[0])
            if self.found_inf is not None:
                taken -= self.found_inf
            torch._foreach_add_(counts, [taken] * len(counts))  # one tensor would be read
            values = {**group, STEP: counts[0].double()}
            values |= self._advance(values, used)
            for bucket in buckets:
                pieces = [piece for piece in bucket if piece.weight.grad is not None]
                if pieces:
                    self._update_bucket(values, pieces)

    def _advance(self, group: dict[str, Any], used: list[Tensor]) -> dict[str, Tensor]:
        """Update the numbers that are kept with each weight, and return them."""
        old = {name: self.state[used[0]][name] for name in self.scalar_names}
        new = self.advance(group, old)
        for name, value in new.items():
            if self.found_inf is not None:
                new[name] = torch.where(self.found_inf.bool(), old[name], value)
            kept = [self.state[weight][name] for weight in used]
            torch._foreach_copy_(kept, [new[name]] * len(kept))
        return new

    def _make_buckets(self, group: dict[str, Any]) -> Iterator[list[Piece]]:
        """Yield the pieces of a group's weights that are updated together."""
        bucket: list[Piece] = []
        room, dtype = 0, None
        for weight, first in self._with_positions(group):
            local = local_of(weight)
            positions = ElementPositions(weight, first)
            size = _ON_CPU if local.device.type == "cpu" else _ON_DEVICE
            # A weight in another memory format is not cut, because its shard cannot be flattened.
            limit = size if local.is_contiguous() else max(local.numel(), 1)
            for start in range(0, local.numel(), limit):
                stop = min(start + limit, local.numel())
                if stop - start > room or dtype != (local.dtype, local.device):
                    if bucket:
                        yield bucket
                    bucket, room = [], size
                dtype = local.dtype, local.device
                room -= stop - start
                piece = Piece(weight=weight, start=start, stop=stop, positions=positions)
                bucket.append(piece)
        if bucket:
            yield bucket

    def _with_positions(self, wanted: dict[str, Any]) -> Iterator[tuple[Tensor, int]]:
        """Yield the weights of a group, each with the position of its first element."""
        first = 0
        for group in self.param_groups:
            for weight in group["params"]:
                if group is wanted:
                    yield weight, first
                first += weight.numel()

    def _state_of(self, weight: Tensor) -> dict[str, Any]:
        """Return the state of a weight, of zeros before its first step."""
        state: dict[str, Any] = self.state[weight]
        if not state:
            dtype = torch.float64 if weight.dtype == torch.float64 else self._state_dtype
            state[STEP] = torch.zeros((), dtype=torch.float32, device=weight.device)
            for name in self.scalar_names:
                state[name] = torch.zeros((), dtype=torch.float64, device=weight.device)
            state |= self.initial_states(weight, dtype)
        return state

    def initial_states(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        """Return the states of a weight before its first step."""
        return {name: torch.zeros_like(weight, dtype=dtype) for name in self.state_names}

    def _update_bucket(self, group: dict[str, Any], pieces: list[Piece]) -> None:
        """Update the elements of some pieces."""
        names = (WEIGHT, *self.state_names)
        old = {name: self._join(name, pieces) for name in names}
        computed = torch.float64 if old[WEIGHT].dtype == torch.float64 else torch.float32
        new = self.update(
            group,
            _copy(old[WEIGHT], computed),
            _copy(self._join(_GRADIENT, pieces), computed),
            *(_copy(old[name], computed) for name in self.state_names),
        )
        rounded = self._round(dict(zip(names, new, strict=True)), old, pieces, group[STEP])
        sizes = [piece.stop - piece.start for piece in pieces]
        for name, values in rounded.items():
            if self.found_inf is not None:
                values = torch.where(self.found_inf.bool(), old[name], values)  # noqa: PLW2901
            targets = [self._part(name, piece) for piece in pieces]
            parts = zip(targets, values.split(sizes), strict=True)
            torch._foreach_copy_(targets, [part.view(target.shape) for target, part in parts])

    def _round(
        self,
        new: dict[str, Tensor],
        old: Mapping[str, Tensor],
        pieces: list[Piece],
        step: Tensor,
    ) -> dict[str, Tensor]:
        """Return new values in the dtypes in which the old ones are kept."""
        rounded = [name for name in new if old[name].dtype == torch.bfloat16]
        if not rounded:
            return new
        device = new[WEIGHT].device
        positions = [
            piece.positions.of(piece.start, piece.stop - piece.start, device) for piece in pieces
        ]
        bits = random_bits(torch.cat(positions), self._seed, step)
        for number, name in enumerate(rounded):
            if number and number % 2 == 0:  # the 16 bits of two values are used up
                bits = random_bits(bits, self._seed + number, step)
            half = (bits >> 16 if number % 2 else bits) & 0xFFFF
            new[name] = round_to_bfloat16(new[name], half)
        return new

    def _join(self, name: str, pieces: list[Piece]) -> Tensor:
        """Return the elements of pieces as one tensor of shape (n,)."""
        parts = [self._part(name, piece).reshape(-1) for piece in pieces]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _part(self, name: str, piece: Piece) -> Tensor:
        """Return the elements of a piece, as a view of the weight, its gradient or a state."""
        if name == WEIGHT:
            tensor = piece.weight
        elif name == _GRADIENT:
            assert piece.weight.grad is not None
            tensor = piece.weight.grad
        else:
            tensor = self.state[piece.weight][name]
        local = local_of(tensor.detach())
        whole = piece.stop - piece.start == local.numel()
        return local if whole else local.reshape(-1)[piece.start : piece.stop]


def local_of(tensor: Tensor) -> Tensor:
    """Return this rank's shard of a tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _copy(values: Tensor, dtype: torch.dtype) -> Tensor:
    """Return values in a dtype, in memory of their own."""
    return values.to(dtype, copy=True)
