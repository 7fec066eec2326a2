"""The states of a metric of torchmetrics, and their combination over ranks.

A metric keeps its states in attributes, which `add_state` registers with a default and a reduction.
This module combines those whose reduction is exact for any split of the samples: sums, extremes,
and lists, whose elements are put in the order of the data.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from launcher.engine.backends.base import Backend
from launcher.engine.backends.nested_tensors import map_tensors
from launcher.errors import RecipeError

_REDUCTIONS = {"dim_zero_sum": "sum", "dim_zero_max": "max", "dim_zero_min": "min"}
"""Reductions of tensors that are exact for any split, by the name of torchmetrics' function."""


class Place(NamedTuple):
    """Where samples are in an evaluation."""

    batch: int
    """The number of the evaluation batch."""

    part: int
    """Which part of it: that of a virtual rank or, without those, of a data rank."""


class _State(NamedTuple):
    """A state of a metric, or of one of the metrics inside it."""

    owner: Any
    name: str
    reduction: str
    """sum, max, min or list."""

    @property
    def value(self) -> Any:
        return getattr(self.owner, self.name)

    @value.setter
    def value(self, value: Any) -> None:
        setattr(self.owner, self.name, value)


@dataclass(kw_only=True)
class _OwnStates:
    """What a rank tells the others of its states; tensors are on the host."""

    num_updates: list[int]
    """For each metric, how often it was updated."""

    lists: list[list[tuple[Place, list[Any]]]]
    """For each list, what each update appended to it."""

    extremes: list[Tensor]
    """The states that are reduced to a maximum or minimum."""

    sums: list[tuple[torch.Size, torch.dtype]]
    """The shapes and types of the states that are summed."""


def own_metrics(metric: Any) -> list[Any]:
    """Return the metrics of torchmetrics inside a metric, which may be one itself."""
    modules = metric.modules() if callable(getattr(metric, "modules", None)) else [metric]
    return [each for each in modules if isinstance(getattr(each, "_defaults", None), dict)]


def find_states(metric: Any) -> MetricStates | None:
    """Return the states of a metric, or None if they cannot be combined exactly."""
    states = []
    for owner in own_metrics(metric):
        reductions = getattr(owner, "_reductions", {})
        for name, default in owner._defaults.items():  # noqa: SLF001
            reduction = _reduction_of(default, reductions.get(name, "unknown"))
            if reduction is None:
                return None
            states.append(_State(owner, name, reduction))
    return MetricStates(metric, states) if states else None


def _reduction_of(default: Any, function: Any) -> str | None:
    """Return how a state is combined; None if its reduction may depend on the split."""
    name = getattr(function, "__name__", None)
    if isinstance(default, list):
        return "list" if function is None or name == "dim_zero_cat" else None
    reduction = _REDUCTIONS.get(str(name))
    if reduction == "sum" and (default.dtype == torch.bool or bool(default.any())):
        return None  # the default would be counted once for each rank
    return reduction


@dataclass
class MetricStates:
    """The states of a metric on this rank."""

    metric: Any
    """The metric, which may hold others, as a `MetricCollection` does."""

    states: list[_State]
    """Its states, and those of the metrics inside it."""

    added: list[tuple[Place, list[int]]] = field(default_factory=list)
    """For each update, the lengths of the lists after it."""

    def reset(self) -> None:
        """Forget what was updated."""
        self.added.clear()

    def record(self, place: Place) -> None:
        """Record, after an update, the place of the samples that it was about."""
        self.added.append((place, [len(state.value) for state in self._with("list")]))

    def combine(self, backend: Backend) -> None:
        """Replace the states by those over all ranks, complete on rank 0 (collective).

        Raises:
            RecipeError: A state that is summed has different shapes on some ranks.
        """
        ranks = [own for own in backend.gather(self._own(backend)) if own is not None]
        updated = [own for own in ranks if any(own.num_updates)] or ranks
        for index, state in enumerate(self._with("sum")):
            self._sum(backend, state, [own.sums[index] for own in updated])
        if backend.rank != 0:
            return
        for index, state in enumerate(self._with("list")):
            on_host = getattr(state.owner, "compute_on_cpu", False)
            place = functools.partial(_placed, torch.device("cpu") if on_host else backend.device)
            chunks = [chunk for own in updated for chunk in own.lists[index]]
            chunks.sort(key=lambda chunk: chunk[0])
            elements = [element for _, appended in chunks for element in appended]
            state.value = map_tensors(place, elements)
        for index, state in enumerate(self._with("max", "min")):
            values = torch.stack([own.extremes[index] for own in updated]).to(backend.device)
            state.value = values.amax(0) if state.reduction == "max" else values.amin(0)
        for index, owner in enumerate(own_metrics(self.metric)):
            owner._update_count = sum(own.num_updates[index] for own in updated)  # noqa: SLF001

    def _with(self, *reductions: str) -> list[_State]:
        return [state for state in self.states if state.reduction in reductions]

    def _own(self, backend: Backend) -> _OwnStates | None:
        """Return what this rank tells; None if another one has the same samples."""
        if not backend.leads_group:
            return None
        metrics = own_metrics(self.metric)
        sums = [torch.as_tensor(state.value) for state in self._with("sum")]
        return _OwnStates(
            num_updates=[getattr(owner, "_update_count", 0) for owner in metrics],
            lists=[list(self._chunks(i, each)) for i, each in enumerate(self._with("list"))],
            extremes=[torch.as_tensor(state.value).cpu() for state in self._with("max", "min")],
            sums=[(value.shape, value.dtype) for value in sums],
        )

    def _chunks(self, index: int, state: _State) -> Iterator[tuple[Place, list[Any]]]:
        """Yield what each update appended to a list, with the place of its samples."""
        start = 0
        for place, lengths in self.added:
            elements = state.value[start : lengths[index]]
            yield place, map_tensors(to_host, elements)
            start = lengths[index]

    def _sum(
        self, backend: Backend, state: _State, kinds: list[tuple[torch.Size, torch.dtype]]
    ) -> None:
        """Replace a state by its sum over ranks (collective).

        Args:
            backend: The ranks.
            state: The state.
            kinds: Its shape and type on each rank that has samples.

        Raises:
            RecipeError: The shapes differ.
        """
        (shape, dtype), *others = kinds
        if any(other[0] != shape for other in others):
            shapes = " and ".join(str(tuple(other)) for other in {kind[0] for kind in kinds})
            raise RecipeError(
                f"The state {state.name} of {type(state.owner).__name__} has the shapes {shapes} "
                "on the ranks, so it cannot be summed over them."
            )
        value = torch.as_tensor(state.value)
        is_own = value.shape == shape  # a rank without samples may hold a default of another shape
        term = value.to(dtype) if is_own else torch.zeros(shape, dtype=dtype, device=value.device)
        term = term.to(backend.device).contiguous().clone()
        state.value = backend.sum_samples(term)


def to_host(tensor: Tensor) -> Tensor:
    """Return a tensor without its gradient function in host memory."""
    return tensor.detach().cpu()


def _placed(device: torch.device, tensor: Tensor) -> Tensor:
    return tensor.to(device)
