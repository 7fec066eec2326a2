"""The numbers that a recipe logs while it trains, reduced with the measurements of its steps.

A rank adds up what its micro-batches log, per step and name, and keeps the sums on the device.
Ranks may log different names in different steps. What they exchange has a fixed layout, that of the
names on which they have agreed. A rank that has logged a new name says so in the same exchange, and
all ranks then agree on the new names, in alphabetical order, and exchange their numbers once more.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.engine.backends.base import Backend
from launcher.engine.backends.nested_tensors import describe_nested
from launcher.engine.backends.transfers import upload, upload_tensor
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.errors import RecipeError
from launcher.planning.virtual_ranks import virtual_rank_of
from launcher.recipe.training_log import check_logged_name, set_receiver

_MAX_NAMES = 256
"""Number of names that a run may log; more are a mistake, such as a name with a step in it."""

Logged = dict[tuple[str, int], tuple[Any, Any]]
"""(sum, count) of what a rank has logged in a step, by name and virtual rank; floats, or float64
tensors on the device. The virtual rank is 0 unless the run is exact."""


class LoggedNumbers:
    """Receives what loss and forward log, and reduces it over ranks.

    Args:
        backend: This rank among the others.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._is_exact = backend.plan.exact
        self._names: list[str] = []
        """The names on which the ranks have agreed, in an order that is equal on every rank."""

        self._seen: set[str] = set()
        """The names that this rank has logged."""

        self._step: Logged = {}
        self._part, self._has_weight, self._prefix = 0, False, ""
        # Loading torch.compile takes more than a second; without it nothing is compiled.
        is_compiling = "torch._dynamo" in sys.modules
        self._receiver = torch.compiler.disable(self._receive) if is_compiling else self._receive

    def of(self, request: MicroBatchRequest, objective: str = "") -> LoggedNumbers:
        """Return a context in which calls of `log` belong to a micro-batch.

        It must end before the backward pass, which may compute activations again.

        Args:
            request: The request for the micro-batch.
            objective: Name of the objective whose turn it is, which precedes the names of its
                numbers; empty if the recipe has one loss.
        """
        self._prefix = f"{objective}/" if objective else ""
        self._has_weight = request.has_weight
        if self._is_exact and self._has_weight:
            self._part = virtual_rank_of(request.part)
        return self

    def __enter__(self) -> None:
        if self._has_weight:
            set_receiver(self._receiver)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        set_receiver(None)

    def _receive(self, name: str, total: Any, count: Any) -> None:
        full_name = self._prefix + name if isinstance(name, str) else None
        if full_name not in self._seen:
            self._check_name(name)
            full_name = f"{self._prefix}{name}"
            self._seen.add(full_name)
        key = full_name, self._part
        before = self._step.get(key, (None, None))
        self._step[key] = self._add(before[0], total, name), self._add(before[1], count, name)

    def _check_name(self, name: Any) -> None:
        check_logged_name("launcher.log(name, sum, count)", name)
        if len(self._seen) == _MAX_NAMES:
            raise RecipeError(
                f"launcher.log was called with more than {_MAX_NAMES} names, of which {name!r} is "
                "the latest. A name stands for a curve over the steps: leave the step, the sample "
                "and the like out of it."
            )

    def _add(self, total: Any, value: Any, name: str) -> float | Tensor:
        """Return the sum of a total, or None, and a value, without waiting for the device.

        The result shares no memory with the value, which the recipe may change in place.

        Raises:
            RecipeError: The value is not a single number.
        """
        number: float | Tensor | None
        if type(value) is int or type(value) is float:
            number = float(value)
        elif not isinstance(value, Tensor):
            number = _as_float(value)
        elif value.numel() != 1 or value.is_complex() or isinstance(value, DTensor):
            number = None
        elif value.is_cpu:
            number = float(value.item())  # waits for no device
        else:
            value = value.detach().reshape(())
            if isinstance(total, Tensor):
                return total.add_(value)
            number = value.to(self._backend.device, torch.float64, copy=True)
        if number is None:
            raise RecipeError(
                f"launcher.log({name!r}, sum, count): expected two numbers, or tensors with one "
                f"number each, found {describe_nested(value)}. Give the sum over the items, and "
                "their number."
            )
        return number if total is None else total + number

    def take(self) -> Logged:
        """Return what this rank has logged since the last call: that of one step."""
        step, self._step = self._step, {}
        return step

    @property
    def has_new(self) -> bool:
        """Whether this rank has logged a name on which the ranks have not agreed."""
        return not self._seen.issubset(self._names)

    def packed(self, steps: Sequence[Logged]) -> Tensor:
        """Return the numbers of this rank under the agreed names, to be summed over ranks.

        Returns:
            A float64 tensor of shape (rows, 3), equal on every rank. It has no rows in exact runs,
            which exchange the numbers of each virtual rank by themselves.
        """
        if self._is_exact or not self._names:
            return torch.zeros(0, 3, dtype=torch.float64, device=self._backend.device)
        flat = self._table(steps, self._names).view(-1)
        if not self._backend.leads_group:  # the first rank of its group logs the same numbers
            flat = torch.zeros_like(flat)
        return torch.nn.functional.pad(flat, (0, -len(flat) % 3)).view(-1, 3)

    def means(
        self, steps: Sequence[Logged], sums: list[list[float]], *, any_new: bool
    ) -> list[dict[str, float]]:
        """Return the mean of each name in each step, over all ranks (collective).

        Args:
            steps: What this rank has logged.
            sums: What `packed` returned, summed over ranks.
            any_new: Whether a rank has logged a new name; equal on every rank.
        """
        means: list[dict[str, float]] = [{} for _ in steps]
        if self._names:
            if self._is_exact:
                totals = self._exchange(steps, self._names)
            else:
                totals = iter([number for row in sums for number in row])
            _put_means(means, self._names, totals)
        if any_new:
            own = self._seen.difference(self._names)
            new = sorted({name for names in self._backend.gather(own) for name in names})
            _put_means(means, new, self._exchange(steps, new))
            self._names += new
        return means

    def _exchange(self, steps: Sequence[Logged], names: Sequence[str]) -> Iterator[float]:
        """Return (sum, count) of each name in each step, over all ranks (collective).

        The numbers of virtual ranks are added with one rounding, as their losses are.
        """
        table = self._backend.sum_samples(self._table(steps, names))
        return map(math.fsum, self._backend.read(table))

    def _table(self, steps: Sequence[Logged], names: Sequence[str]) -> Tensor:
        """Return the numbers of this rank.

        Returns:
            A float64 tensor with a row for (step, name, sum or count), in this order, and a column
            for each virtual rank, or one column.
        """
        num_parts = self._backend.plan.distribution.count if self._is_exact else 1
        rows = {name: 2 * index for index, name in enumerate(names)}
        numbers = [0.0] * (len(steps) * len(names) * 2 * num_parts)
        tensors: dict[int, Tensor] = {}
        for step_index, step in enumerate(steps):
            for (name, part), pair in step.items():
                if name not in rows:
                    continue
                row = step_index * len(names) * 2 + rows[name]
                for value, place in zip(pair, (row, row + 1), strict=True):
                    if isinstance(value, Tensor):
                        tensors[place * num_parts + part] = value
                    else:
                        numbers[place * num_parts + part] = value
        table = upload(numbers, self._backend.device)
        if tensors:
            places = upload_tensor(torch.tensor(list(tensors)), table.device)
            table.index_copy_(0, places, torch.stack(list(tensors.values())))
        return table.view(-1, num_parts)


def _as_float(value: Any) -> float | None:
    """Return a number as a float; None if the value is something else."""
    if isinstance(value, str):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def _put_means(
    means: list[dict[str, float]], names: Sequence[str], totals: Iterator[float]
) -> None:
    """Add the mean of each name to the steps that have counted something under it."""
    for step in means:
        for name in names:
            total, count = next(totals), next(totals)
            if count:
                step[name] = total / count
