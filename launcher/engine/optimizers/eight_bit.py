"""AdamW whose two moments are kept in 8 bits each, with a scale for every 256 elements.

Dettmers et al., "8-bit Optimizers via Block-wise Quantization" (arXiv:2110.02861). A block lies
within one row of a weight. Strategies that shard weights by rows therefore never cut a block, and
the states have the same bits on any number of ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional

from launcher.engine.optimizers.flat import STEP, WEIGHT, Piece, local_of
from launcher.engine.optimizers.rounding import ElementPositions
from launcher.engine.optimizers.small_adamw import SmallAdamW
from launcher.errors import RecipeError

BLOCK = 256
"""Elements that share a scale."""

_SMALLEST, _SHORTEST_ROW = 4096, 64
"""Elements of a weight, and of its rows, below which states stay in float32: 8 bits and a scale
for each short row would save little."""

_ELEMENTS = 1 << 22
"""Elements that are updated together, at most."""

SCALE = "_scale"
"""The end of the names of the states that hold scales."""


class EightBitAdamW(SmallAdamW):
    """AdamW computed in float32, with states of large weights in 8 bits between steps.

    Biases, norms and small weights have states in float32.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._first: dict[Tensor, ElementPositions] = {}
        self._values: dict[tuple[torch.device, bool], Tensor] = {}
        """The values of codes on a device, of first moments or of second ones."""
        for group in self.param_groups:
            for weight in group["params"]:
                is_large(weight)  # refuses weights before the first step

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        super().step(closure)
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is not None and is_large(weight):
                    values = {**group, STEP: self.state[weight][STEP].double()}
                    self._update_rows(values, weight)

    def _with_positions(self, wanted: dict[str, Any]) -> Iterator[tuple[Tensor, int]]:
        for weight, first in super()._with_positions(wanted):
            if is_large(weight):
                self._first[weight] = ElementPositions(weight, first)
            else:
                yield weight, first

    def initial_states(self, weight: Tensor, dtype: torch.dtype) -> dict[str, Tensor]:
        if not is_large(weight):
            return super().initial_states(weight, dtype)
        num_blocks = -(-weight.shape[1:].numel() // BLOCK)
        states = {}
        for name in self.state_names:
            states[name] = torch.zeros_like(weight, dtype=torch.uint8)
            states[name + SCALE] = zeros_by_row(weight, num_blocks, torch.float32)
        return states

    def _update_rows(self, group: dict[str, Any], weight: Tensor) -> None:
        """Update a weight that has states in 8 bits, some rows at a time."""
        assert weight.grad is not None
        state = self.state[weight]
        local = _rows(local_of(weight.detach()))
        gradient = local_of(weight.grad).reshape(local.shape)
        stored = {
            name: (_rows(local_of(state[name])), local_of(state[name + SCALE]))
            for name in self.state_names
        }
        num_rows, columns = local.shape
        step = max(_ELEMENTS // columns, 1)
        for start in range(0, num_rows, step):
            rows = slice(start, min(start + step, num_rows))
            maps = [self._values_of(local.device, name == "exp_avg") for name in stored]
            states = [
                dequantized(codes[rows], scales[rows], values)
                for (codes, scales), values in zip(stored.values(), maps, strict=True)
            ]
            old = local[rows]
            new, *new_states = self.update(
                group, old.to(torch.float32, copy=True), gradient[rows].float().clone(), *states
            )
            piece = Piece(
                weight=weight,
                start=start * columns,
                stop=rows.stop * columns,
                positions=self._first[weight],
            )
            rounded = self._round({WEIGHT: new.view(-1)}, {WEIGHT: old}, [piece], group[STEP])
            self._write(old, rounded[WEIGHT].view(old.shape))
            for (codes, scales), values, new_state in zip(
                stored.values(), maps, new_states, strict=True
            ):
                new_codes, new_scales = quantized(new_state, values)
                self._write(codes[rows], new_codes)
                self._write(scales[rows], new_scales)

    def _values_of(self, device: torch.device, is_signed: bool) -> Tensor:
        key = device, is_signed
        if key not in self._values:
            self._values[key] = code_values(device, is_signed=is_signed)
        return self._values[key]

    def _write(self, target: Tensor, values: Tensor) -> None:
        skipped = self.found_inf
        target.copy_(values if skipped is None else torch.where(skipped.bool(), target, values))


def is_large(weight: Tensor) -> bool:
    """Return whether the states of a weight are in 8 bits.

    Raises:
        RecipeError: They would be, but the weight is sharded within its rows.
    """
    if weight.ndim < 2 or weight.numel() < _SMALLEST or weight.dtype == torch.float64:
        return False
    if weight.shape[1:].numel() < _SHORTEST_ROW or not local_of(weight).is_contiguous():
        return False
    if isinstance(weight, DTensor) and any(
        not item.is_replicate() and getattr(item, "dim", 0) != 0 for item in weight.placements
    ):
        raise RecipeError(
            f"States in 8 bits share a scale within rows, and a weight of shape "
            f"{tuple(weight.shape)} is sharded within its rows by {weight.placements}. Use "
            'adamw(state_dtype="bf16"), or shard weights by rows.'
        )
    return True


def zeros_by_row(weight: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """Return zeros of shape (rows of the weight, columns), with the weight's rows on each rank."""
    local = torch.zeros(
        local_of(weight).shape[0], columns, dtype=dtype, device=local_of(weight).device
    )
    if not isinstance(weight, DTensor):
        return local
    return DTensor.from_local(
        local,
        weight.device_mesh,
        weight.placements,
        run_check=False,
        shape=torch.Size((weight.shape[0], columns)),
        stride=(columns, 1),
    )


def quantized(values: Tensor, code_values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the codes of the nearest values, and the scales of blocks.

    Args:
        values: Values of shape (rows, columns).
        code_values: The value of each code, which rise, for a block whose largest magnitude is 1.

    Returns:
        Codes of shape (rows, columns), and scales of shape (rows, blocks).
    """
    blocks = _blocks(values)
    scales = blocks.abs().amax(-1)
    scaled = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny).unsqueeze(-1)
    middles = (code_values[1:] + code_values[:-1]) / 2
    codes = torch.bucketize(scaled, middles, out_int32=True).to(torch.uint8)
    return codes.flatten(1)[:, : values.shape[1]], scales


def dequantized(codes: Tensor, scales: Tensor, code_values: Tensor) -> Tensor:
    """Return the values of codes, of shape (rows, columns)."""
    values = _blocks(code_values[codes.int()]) * scales.unsqueeze(-1)
    return values.flatten(1)[:, : codes.shape[1]].contiguous()


def code_values(device: torch.device, *, is_signed: bool) -> Tensor:
    """Return the 256 values of the dynamic tree of the article: seven decades, finest near 1.

    Args:
        device: Where the values are needed.
        is_signed: From -1 to 1 for first moments; otherwise from 0 to 1 for second moments.
    """
    values = [0.0, 1.0]
    for decade in range(7):
        number = 2 ** (decade if is_signed else decade + 1)
        width = 0.9 / number
        middles = [0.1 + width * (index + 0.5) for index in range(number)]
        values += [middle * 10.0 ** (decade - 6) for middle in middles]
        values += [-middle * 10.0 ** (decade - 6) for middle in middles] if is_signed else []
    assert len(values) == 256
    return torch.tensor(sorted(values), dtype=torch.float32, device=device)


def _rows(tensor: Tensor) -> Tensor:
    """Return a view of a tensor of shape (rows, columns)."""
    return tensor.view(tensor.shape[0], math.prod(tensor.shape[1:]))


def _blocks(values: Tensor) -> Tensor:
    """Return values of shape (rows, columns) as (rows, blocks, BLOCK), padded with zeros."""
    missing = -values.shape[1] % BLOCK
    padded = functional.pad(values, (0, missing)) if missing else values
    return padded.unflatten(1, (-1, BLOCK))
