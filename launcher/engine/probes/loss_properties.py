"""Whether the loss of a batch is the sum of the losses of its parts, and whether it is random."""

from __future__ import annotations

import contextlib
import copy
from dataclasses import dataclass
from statistics import fmean
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from launcher.engine.backends.nested_tensors import tensors_in
from launcher.engine.backends.recipe_forward import call_forward
from launcher.engine.data.fingerprint import are_equal
from launcher.engine.data.randomness import seed_all
from launcher.engine.probes.held_draws import RecordedDraws, RepeatedDraws
from launcher.engine.probes.parity import in_float64
from launcher.engine.state.compiled import is_compiled
from launcher.engine.training.loss_calls import LOSS, sum_and_count
from launcher.recipe.recipe import Recipe

_TOLERANCE = 1e-3
"""Relative tolerance of sums: far above rounding, far below the effects that are tested."""

_ROUNDING = 1e-5
"""Relative difference up to which two results of the same seed differ by rounding alone, as some
kernels add numbers in varying order."""


@dataclass(frozen=True, kw_only=True)
class LossProperties:
    """How the loss of a batch relates to the losses of its halves, and to the seed."""

    is_sum: bool | None
    """Whether it is their sum in evaluation; None if that cannot be judged, because the model draws
    random numbers that cannot be repeated for the halves, or works in training only."""

    is_mean: bool
    is_coupled: bool
    """Whether it is the sum in evaluation, but not in training."""

    is_random: bool
    """Whether outputs or loss change with the seed in training."""

    is_random_in_evaluation: bool
    """Whether they do so in evaluation as well."""


class _Losses(NamedTuple):
    """The loss of a batch and those of its halves."""

    batch: float
    halves: list[float]


class LossProbe:
    """Calls a recipe's forward and loss on a batch and its parts.

    Args:
        recipe: The recipe.
        model: The recipe's model.
        batch: A batch.
        halves: The two halves of the batch, or the batch alone if it has one sample.
        num_samples: The number of samples in the batch.
        has_state: Whether forward changes the model; each forward then gets a copy, because the
            effect of one on the next would look like randomness.
    """

    def __init__(
        self,
        recipe: Recipe,
        model: nn.Module,
        batch: Any,
        halves: list[Any],
        *,
        num_samples: int,
        has_state: bool,
    ) -> None:
        self._recipe, self._model = recipe, model
        self._batch, self._halves = batch, halves
        self._num_samples, self._has_state = num_samples, has_state

    @torch.no_grad()
    def inspect(self, *, samples_change: bool) -> LossProperties:
        """Compare losses in evaluation and in training, and leave the model in training mode.

        Args:
            samples_change: Whether the samples differ when they are read again. The losses of
                batch and halves then differ for that reason, and are not compared.
        """
        self._model.eval()
        is_random_in_evaluation, losses = False, None
        with contextlib.suppress(Exception):  # some models and losses work in training only
            is_random_in_evaluation = self._is_random()
            losses = self._losses(is_random_in_evaluation)
        self._model.train()
        with torch.enable_grad():  # some losses need outputs with gradients
            is_random = self._is_random()
            training_losses = self._losses(is_random)
        is_sum = _is_sum(losses)
        if is_sum is not None and samples_change:
            is_sum = True
        return LossProperties(
            is_sum=is_sum,
            is_mean=is_sum is False and _is_mean(losses),
            is_coupled=bool(is_sum) and not samples_change and _is_sum(training_losses) is False,
            is_random=is_random,
            is_random_in_evaluation=is_random_in_evaluation,
        )

    def _losses(self, is_random: bool) -> _Losses | None:
        """Return the losses of the batch and of its halves, with the same random numbers.

        Returns:
            The losses, or None if the random numbers of the batch cannot be repeated.
        """
        if not is_random:
            return _Losses(self._loss(self._batch), [self._loss(half) for half in self._halves])
        with _uncompiled(self._model):
            with RecordedDraws() as recorded:
                batch_loss = self._loss(self._batch)
            start, losses, is_held = 0, [], bool(recorded.draws)
            middle = max(self._num_samples // 2, 1)
            ends = [middle, self._num_samples][-len(self._halves) :]
            for half, end in zip(self._halves, ends, strict=True):
                part = range(start, end)
                with RepeatedDraws(recorded.draws, part, self._num_samples) as repeated:
                    losses.append(self._loss(half))
                is_held, start = is_held and repeated.is_held, end
        return _Losses(batch_loss, losses) if is_held else None

    def _is_random(self) -> bool:
        """Return whether outputs or loss of the batch change with the seed.

        A change with the same seed counts as well, unless it is as small as rounding: a generator
        of the model's own knows no seed.
        """
        first, again, other = (self._call(self._batch, seed) for seed in (1, 1, 2))
        if are_equal(first, again):
            return not are_equal(first, other)
        return not (_are_close(first, again) and _are_close(first, other))

    def _loss(self, batch: Any) -> float:
        return float(self._call(batch, 0)[-1])

    def _call(self, batch: Any, seed: int) -> list[Tensor]:
        """Return the tensors of the outputs, and the loss."""
        seed_all(seed)
        subject = copy_model(self._recipe, self._model) if self._has_state else self._model
        seed_all(seed)  # a copy may draw random numbers
        outputs = call_forward(self._recipe.forward, subject, batch)
        total, _ = sum_and_count(self._recipe.loss, outputs, batch, name=LOSS)
        return [tensor.detach() for tensor in (*tensors_in(outputs), torch.as_tensor(total))]


def copy_model(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Return an independent model with the same weights, buffers and mode."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # computed weights, as by torch.nn.utils.weight_norm, cannot be copied
        seed_all(recipe.seed)
        return recipe.model().train(model.training)


def _uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """Return a context in which the operations of a compiled model can be observed."""
    if is_compiled(model):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _is_sum(losses: _Losses | None) -> bool | None:
    return None if losses is None else _is_close(losses.batch, sum(losses.halves))


def _is_mean(losses: _Losses | None) -> bool:
    return losses is not None and _is_close(losses.batch, fmean(losses.halves))


def _is_close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other), 1e-12)


def _are_close(ones: list[Tensor], others: list[Tensor]) -> bool:
    """Return whether tensors differ by rounding alone."""
    return len(ones) == len(others) and all(
        one.shape == other.shape
        and torch.allclose(
            in_float64(one),
            in_float64(other),
            rtol=_ROUNDING,
            atol=_ROUNDING * float(in_float64(one).abs().max()) if one.numel() else 0.0,
            equal_nan=True,
        )
        for one, other in zip(ones, others, strict=True)
    )
