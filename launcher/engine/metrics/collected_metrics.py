"""Metrics over all predictions of an evaluation, exact on any number of ranks.

A metric whose states can be combined is updated on each rank with its own samples, and the states
are combined at the end. Every other one exists on rank 0 alone: the arguments of its updates are
gathered, batch by batch, and passed to it in the order of the data. Rank 0 computes the results and
sends them to the others, so they are equal on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.backends.nested_tensors import describe_nested, map_tensors
from launcher.engine.data.randomness import Generators, seed_all
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.metrics.metric_calls import metric_call, numbers_of
from launcher.engine.metrics.metric_states import Place, find_states, own_metrics, to_host
from launcher.errors import RecipeError
from launcher.printable import kind_of
from launcher.recipe.prediction_metric import (
    PredictionMetric,
    is_metric_object,
    prediction_metrics,
)
from launcher.recipe.recipe import Recipe


def build_metric(name: str, metric: PredictionMetric) -> Any:
    """Return a new object for a metric, which communicates with no other process.

    Raises:
        RecipeError: The function of the recipe raised an exception, or what it returned has no
            `update`, `compute` and `reset`.
    """
    try:
        built = metric.build()
    except ImportError as error:
        raise RecipeError(
            f"The metric {name} cannot be built: {error}. Install that package, or leave the "
            "metric out."
        ) from None
    if not is_metric_object(built) or isinstance(built, type):
        raise RecipeError(
            f"The metric {name}: expected a function that builds an object with the methods "
            f"update, compute and reset, found {kind_of(built)}."
        )
    for each in own_metrics(built):
        each.distributed_available_fn = _never
    for each in built.modules() if callable(getattr(built, "modules", None)) else ():
        # Which metrics of a collection share their states would be guessed from the first batch,
        # and could differ with the number of ranks.
        if getattr(each, "_enable_compute_groups", None) is True:
            each._enable_compute_groups = False  # noqa: SLF001
    return built


def update_metric(name: str, metric: PredictionMetric, built: Any, outputs: Any, batch: Any) -> Any:
    """Update a metric with a batch, and return the arguments of the update."""
    arguments = read_arguments(name, metric, outputs, batch)
    call_update(built, arguments)
    return arguments


def read_arguments(name: str, metric: PredictionMetric, outputs: Any, batch: Any) -> Any:
    """Return the arguments of a metric's `update` for a batch.

    Raises:
        RecipeError: The function of the recipe returned neither a tuple nor a dict.
    """
    arguments = metric.arguments(outputs, batch)
    if isinstance(arguments, (tuple, Mapping)):
        return arguments
    raise RecipeError(
        f"The metric {name}: expected a function (outputs, batch) -> the arguments of update as a "
        f"tuple such as (predictions, targets), or as a dict by name; it returned "
        f"{describe_nested(arguments)}."
    )


def call_update(built: Any, arguments: Any) -> None:
    """Call `update` with a tuple of arguments, or with arguments by name."""
    if isinstance(arguments, Mapping):
        built.update(**arguments)
    else:
        built.update(*arguments)


class CollectedMetrics:
    """The metrics of a recipe that need all predictions, on one rank (creating it is collective).

    Args:
        recipe: What is trained; None for a training without evaluations.
        backend: This rank among the others.

    Raises:
        RecipeError: A metric cannot be built.
    """

    def __init__(self, recipe: Recipe | None, backend: Backend) -> None:
        self._backend, self._distribution = backend, backend.plan.distribution
        self._metrics: list[_Collected] = []
        self._num_micro_batches, self._place = 0, ""
        kinds = {} if recipe is None else prediction_metrics(recipe.metrics)
        if recipe is None or not kinds:
            return
        generators = Generators()
        try:
            seed_all(recipe.seed)
            built = backend.local_rank_zero_first(
                "built the metrics", lambda: {n: build_metric(n, kind) for n, kind in kinds.items()}
            )
        finally:
            generators.restore()
        for name, kind in kinds.items():
            metric = built[name]
            if callable(getattr(metric, "to", None)):
                metric = metric.to(backend.device)
            states = None if backend.plan.exact else find_states(metric)
            collected = _Gathered if states is None else _Combined
            self._metrics.append(collected(name, kind, metric, backend))

    def begin(self, place: str) -> None:
        """Begin an evaluation.

        Args:
            place: A description for errors: `the dev evaluation after step 500, on rank 1`.
        """
        self._num_micro_batches, self._place = 0, place
        for metric in self._metrics:
            metric.reset()

    def add(self, outputs: Any, batch: Any, request: MicroBatchRequest) -> None:
        """Add the predictions for a micro-batch (collective).

        Every rank must call this for every micro-batch, also for one without a weight.

        Raises:
            RecipeError: The arguments of an update are no tuple and no dict.
            TrainingError: A metric raised an exception.
        """
        if not self._metrics:
            return
        rounds = self._distribution.rounds
        number, position = divmod(self._num_micro_batches, rounds)
        self._num_micro_batches += 1
        part = request.part.virtual_rank if request.part is not None else self._backend.data_rank
        for metric in self._metrics:
            with metric_call(f"The metric {metric.name}", self._place):
                if request.has_weight and self._backend.leads_group and part is not None:
                    metric.add(outputs, batch, Place(number, part))
                if position == rounds - 1:
                    metric.end_batch()

    def try_update(self, name: str, outputs: Any, batch: Any) -> None:
        """Update a metric with a few samples, and forget them.

        Raises:
            RecipeError: The arguments of the update are no tuple and no dict.
        """
        metric = next(each for each in self._metrics if each.name == name)
        try:
            update_metric(name, metric.kind, metric.built, outputs, batch)
        finally:
            metric.reset()

    def results(self) -> dict[str, float]:
        """Return the results by name, equal on every rank (collective).

        Raises:
            RecipeError: A result is no number.
            TrainingError: A metric raised an exception.
        """
        values: dict[str, float] = {}
        for metric in self._metrics:
            with metric_call(f"The metric {metric.name}", self._place):
                metric.combine()
                if self._backend.rank == 0:
                    values |= numbers_of(metric.name, metric.built.compute())
            metric.reset()
        if not self._metrics:
            return values
        received: dict[str, float] = self._backend.broadcast(values)
        return received


class _Combined:
    """A metric whose states are combined over ranks."""

    def __init__(self, name: str, kind: PredictionMetric, built: Any, backend: Backend) -> None:
        self.name, self.kind, self.built, self._backend = name, kind, built, backend
        states = find_states(built)
        assert states is not None
        self._states = states

    def reset(self) -> None:
        self.built.reset()
        self._states.reset()

    def add(self, outputs: Any, batch: Any, place: Place) -> None:
        update_metric(self.name, self.kind, self.built, outputs, batch)
        self._states.record(place)

    def end_batch(self) -> None:
        """Do nothing: states are combined after the last batch."""

    def combine(self) -> None:
        self._states.combine(self._backend)


class _Gathered:
    """A metric of which rank 0 gets all updates, in the order of the data."""

    def __init__(self, name: str, kind: PredictionMetric, built: Any, backend: Backend) -> None:
        self.name, self.kind, self.built, self._backend = name, kind, built, backend
        self._held: list[tuple[Place, Any]] = []

    def reset(self) -> None:
        self.built.reset()
        self._held = []

    def add(self, outputs: Any, batch: Any, place: Place) -> None:
        arguments = read_arguments(self.name, self.kind, outputs, batch)
        self._held.append((place, map_tensors(to_host, arguments)))

    def end_batch(self) -> None:
        held, self._held = self._held, []
        ranks = self._backend.gather(held)
        if self._backend.rank != 0:
            return
        device = self._backend.device
        for _, arguments in sorted((each for own in ranks for each in own), key=lambda e: e[0]):
            call_update(self.built, map_tensors(lambda tensor: tensor.to(device), arguments))

    def combine(self) -> None:
        """Do nothing: rank 0 has had all updates."""


_Collected = _Combined | _Gathered


def _never() -> bool:
    return False
