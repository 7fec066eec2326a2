"""Muon: momentum whose matrices are orthogonalised.

Keller Jordan, "Muon: An optimizer for hidden layers in neural networks" (2024). torch.optim.Muon
computes the same on one rank; this one works on weights that are sharded, and skips steps on the
device.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.optim import Optimizer

from launcher.engine.optimizers.exchanges import Exchange, rounds
from launcher.engine.optimizers.flat import STEP
from launcher.engine.optimizers.matrices import FlatWeight, Matrix, WeightMatrix
from launcher.engine.optimizers.rounding import ElementPositions, random_bits, round_to_bfloat16

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""The quintic of Newton and Schulz whose slope at zero is steepest, from the article."""

_SMALLEST_NORM = 1e-7

MATCHED = "match_rms_adamw"
"""The rule by which an update has the root mean square of AdamW's (arXiv:2502.16982)."""


class ShardedMuon(Optimizer):
    """Muon for matrices that one rank has, or that are spread over ranks.

    Args:
        groups: Parameter groups of matrices.
        defaults: lr, momentum, nesterov, weight_decay, steps and adjust of groups.
        dtype: The dtype in which matrices are orthogonalised.
        seed: The seed with which weights in bfloat16 are rounded.
    """

    found_inf: Tensor | None = None
    """A scalar tensor on the device, 1 to skip the step."""

    def __init__(
        self,
        groups: list[dict[str, Any]],
        defaults: dict[str, Any],
        *,
        dtype: torch.dtype,
        seed: int = 0,
    ) -> None:
        super().__init__(groups, {**defaults, "capturable": True})
        self._dtype, self._seed = dtype, seed
        self._positions: dict[Tensor, ElementPositions] = {}
        self._flat: dict[Tensor, list[FlatWeight]] = {}
        self._rounds: dict[Tensor, list[tuple[Exchange, list[Matrix]]]] = {}

    def use_flat(self, weights: Iterable[FlatWeight]) -> None:
        """Find matrices within flat tensors, which have taken their place in the groups.

        Args:
            weights: The weights of which flat tensors hold elements, in the same order on every
                rank. Those of tensors that are not in the groups are ignored.
        """
        for weight in weights:
            self._flat.setdefault(weight.owner, []).append(weight)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Take a step (collective).

        Args:
            closure: Not supported; None.
        """
        assert closure is None
        for group in self.param_groups:
            for owner in group["params"]:
                if owner.grad is not None:
                    self._count_step(owner, owner.grad)
            for exchange, matrices in self._rounds_of(group["params"]):
                used = [matrix for matrix in matrices if matrix.owner.grad is not None]
                if used:
                    self._take_round(group, exchange, used)

    def _rounds_of(self, owners: list[Tensor]) -> list[tuple[Exchange, list[Matrix]]]:
        """Return the rounds in which the ranks work on the matrices of a group."""
        if not owners:
            return []
        first = owners[0]
        if first not in self._rounds:
            matrices: list[Matrix] = []
            for owner in owners:
                matrices += self._flat.get(owner, [WeightMatrix(owner)])
            self._rounds[first] = list(rounds(matrices))
        return self._rounds[first]

    def _take_round(
        self, group: dict[str, Any], exchange: Exchange, matrices: list[Matrix]
    ) -> None:
        """Take the step of the matrices of one round (collective)."""
        updates = [self._momentum(group, matrix).to(self._dtype) for matrix in matrices]

        def orthogonalize(matrix: Tensor) -> Tensor:
            return orthogonalized(matrix, group["steps"])

        directions = exchange.apply(orthogonalize, matrices, updates)
        for matrix, direction in zip(matrices, directions, strict=True):
            local = matrix.part(matrix.owner)
            rate = group["lr"] * rate_factor(matrix.shape, group["adjust"])
            computed = torch.promote_types(local.dtype, torch.float32)
            kept = local.to(computed) * (1.0 - group["lr"] * group["weight_decay"])
            new = kept.sub_(direction.to(computed).mul_(rate))
            if local.dtype == torch.bfloat16:
                new = self._rounded(matrix.owner, new)
            self._write(local, new)

    def _count_step(self, owner: Tensor, gradient: Tensor) -> None:
        """Count the step of a weight or a flat tensor, and create its state before the first."""
        state = self.state[owner]
        if not state:
            state[STEP] = torch.zeros((), dtype=torch.float32, device=owner.device)
            state["momentum_buffer"] = torch.zeros_like(gradient)
        state[STEP] += 1.0 if self.found_inf is None else 1.0 - self.found_inf

    def _momentum(self, group: dict[str, Any], matrix: Matrix) -> Tensor:
        """Add a gradient to the momentum, and return this rank's elements of the update."""
        owner, momentum = matrix.owner, group["momentum"]
        assert owner.grad is not None
        gradient = matrix.part(owner.grad)
        buffer = matrix.part(self.state[owner]["momentum_buffer"])
        scaled = gradient * (1.0 - momentum)
        new = (buffer * momentum).add_(scaled)
        self._write(buffer, new)
        return scaled.add_(new.mul_(momentum)) if group["nesterov"] else new

    def _rounded(self, weight: Tensor, values: Tensor) -> Tensor:
        """Return new values of this rank's shard of a weight, rounded stochastically."""
        if not self._positions:
            first = 0
            for group in self.param_groups:
                for other in group["params"]:
                    self._positions[other] = ElementPositions(other, first)
                    first += other.numel()
        positions = self._positions[weight].of(0, values.numel(), values.device)
        bits = random_bits(positions, self._seed, self.state[weight][STEP]).bitwise_and_(0xFFFF)
        return round_to_bfloat16(values.reshape(-1), bits).view(values.shape)

    def _write(self, target: Tensor, values: Tensor) -> None:
        """Set a tensor, unless the step is skipped."""
        skipped = self.found_inf
        target.copy_(values if skipped is None else torch.where(skipped.bool(), target, values))


def orthogonalized(matrix: Tensor, steps: int) -> Tensor:
    """Return a matrix with the same singular vectors, and singular values of about 1.

    Args:
        matrix: A matrix of shape (rows, columns).
        steps: Iterations of Newton and Schulz; 5 bring values above a thousandth of the norm to
            between 0.7 and 1.2.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrix.shape[0] > matrix.shape[1]
    result = matrix.T if is_tall else matrix
    result = result / result.norm().clamp(min=_SMALLEST_NORM)
    for _ in range(steps):
        gram = result @ result.T
        result = torch.addmm(result, torch.addmm(gram, gram, gram, beta=b, alpha=c), result, beta=a)
    return result.T if is_tall else result


def rate_factor(shape: torch.Size, rule: str) -> float:
    """Return the factor of the learning rate for a matrix.

    Args:
        shape: The shape of the weight; dimensions after the first are columns.
        rule: `match_rms_adamw` or `original`.
    """
    rows, columns = shape[0], shape[1:].numel()
    if rule == MATCHED:
        return 0.2 * math.sqrt(max(rows, columns))
    return math.sqrt(max(1.0, rows / columns))


def hidden_matrices(model: nn.Module, exclude: Sequence[str] = ()) -> dict[str, nn.Parameter]:
    """Return the trained weights that Muon updates, by name.

    They are matrices, and kernels of convolutions seen as one row per output channel, without
    those of embeddings, without the head, and without what `exclude` names. The head is what
    transformers' get_output_embeddings() returns, or else the last of them in the model.

    Args:
        model: The model.
        exclude: Patterns of names, such as `*.gate.weight`.
    """
    embedded = {
        module.weight
        for module in model.modules()
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    kernels = {module.weight for module in model.modules() if isinstance(module, _ConvNd)}
    found = {
        name: weight
        for name, weight in model.named_parameters()
        if weight not in embedded
        and (weight.ndim == 2 or weight in kernels)
        and min(weight.shape[0], weight.shape[1:].numel()) > 1
        and not weight.is_complex()
    }
    for name in list(_heads(model, found)):
        del found[name]
    return {
        name: weight
        for name, weight in found.items()
        if weight.requires_grad and not any(fnmatch.fnmatch(name, item) for item in exclude)
    }


def _heads(model: nn.Module, found: dict[str, nn.Parameter]) -> Iterator[str]:
    """Yield the names of the weights of the head, which may be tied to an embedding."""
    get_head = getattr(model, "get_output_embeddings", None)
    head = None if get_head is None else get_head()
    if isinstance(head, nn.Module):
        weights = set(head.parameters())
        yield from (name for name, weight in found.items() if weight in weights)
    elif found:
        yield list(found)[-1]
