"""From a recipe and a grid of settings to planned runs, all checked before anything starts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from msgspec import Meta

from launcher.analysis.halving import rung_steps
from launcher.environment.machine import Machine
from launcher.errors import PlanError, UsageError
from launcher.planning.evaluation_steps import next_evaluation
from launcher.planning.plan import Plan
from launcher.planning.planner import device_of
from launcher.recipe.grid import combinations_of, count_combinations
from launcher.recipe.metric_goal import MetricGoal, check_goal
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.resolve import Reference, resolve
from launcher.recipe.validation import brief
from launcher.runs.plan_recipe import plan_recipe
from launcher.sweeps.shares import Share, divide
from launcher.sweeps.sweep_record import Axis, SweepRecord, location_in

MAX_RUNS = 1_000
"""Runs of the largest sweep."""

DEFAULT_METRIC = "loss:min"

_SOURCE = "sweep"
"""The source of the values of a run that its sweep sets, which plans show."""


@dataclass(frozen=True, kw_only=True)
class StopRule:
    """How a sweep ends runs early."""

    eta: int
    """Of every so many runs, one goes on."""

    min_steps: int | None
    """Steps before the first choice; None takes as many choices as leave one run."""


@dataclass(frozen=True, kw_only=True)
class SweepRequest:
    """A request to train a recipe with every combination of some settings."""

    reference: Reference
    """The recipe."""

    axes: Mapping[str, Sequence[Any]]
    """The values of each setting that varies."""

    source: str
    """Where these values were given: `command line` or `Python`."""

    overrides: tuple[Override, ...] = ()
    """Values for the recipe in every run, the weaker ones first."""

    nproc_per_node: int = 1
    """Ranks of each run."""

    parallel: int | None = None
    """Runs at a time; None is as many as there are GPUs for, or one on the CPU."""

    goal: MetricGoal
    """The metric by which runs are compared."""

    rule: StopRule | None = None
    """How runs end early; None trains each to its end."""


@dataclass(frozen=True, kw_only=True)
class SweepTrial:
    """One planned run of a sweep."""

    index: int
    settings: Mapping[str, Any]
    """The values that distinguish the run, as plain values."""

    overrides: tuple[Override, ...]
    """All values that the recipe is built with."""

    plan: Plan

    @property
    def shown(self) -> str:
        """Return the settings as text, such as `lr=0.1 seed=2`."""
        return " ".join(f"{name}={value}" for name, value in self.settings.items())


@dataclass(frozen=True, kw_only=True)
class PreparedSweep:
    """A sweep that is planned and checked; nothing has been written."""

    reference: Reference
    record: SweepRecord
    """The content of sweep.json before the first run."""

    goal: MetricGoal
    trials: tuple[SweepTrial, ...]
    shares: tuple[Share, ...]
    """The share of the machine of each run that trains at the same time."""

    rungs: tuple[tuple[int, ...], ...]
    """The steps of each run before each choice; empty without a stop rule."""


def prepare_sweep(request: SweepRequest, machine: Machine) -> PreparedSweep:
    """Plan every run of a sweep.

    Args:
        request: The request.
        machine: This machine.

    Raises:
        UsageError: A setting is unknown or a value does not fit it, a list is empty or holds a
            value twice, there are too many runs, the metric is unknown, or the machine is too
            small.
    """
    _check_axes(request.axes)
    built = [_build(request, pairs) for pairs in combinations_of(request.axes)]
    axes = _converted_axes(request.axes, built)
    goal = request.goal
    for each in built:
        check_goal(goal, each.recipe.metrics, where="--metric")
    devices = {device_of(each.recipe, machine) for each in built}
    if len(devices) > 1:
        raise UsageError("The runs of a sweep must train on the same kind of device.")
    shares = divide(
        machine,
        on_gpus=devices == {"cuda"},
        nproc_per_node=request.nproc_per_node,
        parallel=request.parallel,
    )
    own = shares[0].of(machine)
    planner = _Planner(request, own)
    trials = tuple(planner.plan(index, each, axes) for index, each in enumerate(built))
    rule = request.rule
    return PreparedSweep(
        reference=request.reference,
        record=SweepRecord(
            recipe=request.reference.recorded,
            folder=str(Path.cwd()),
            axes=axes,
            overrides={
                name: value
                for name, value in built[0].overrides.items()
                if name not in request.axes
            },
            nproc_per_node=request.nproc_per_node,
            parallel=request.parallel,
            metric=str(goal),
            stop=None if rule is None else "halving",
            eta=3 if rule is None else rule.eta,
            min_steps=None if rule is None else rule.min_steps,
        ),
        goal=goal,
        trials=trials,
        shares=shares,
        rungs=() if rule is None else _rungs([trial.plan for trial in trials], rule),
    )


def request_of(
    record: SweepRecord, folder: Path, goal: MetricGoal, *, nproc_per_node: int | None = None
) -> SweepRequest:
    """Return the request of a sweep to continue.

    Args:
        record: Its sweep.json.
        folder: Its folder, as an absolute path.
        goal: The goal that `record.metric` describes.
        nproc_per_node: Ranks of each run; None is as many as before.

    Raises:
        RecipeError: The recipe cannot be imported.
    """
    return SweepRequest(
        reference=resolve(location_in(folder, record.recipe)),
        axes={axis.name: axis.values for axis in record.axes},
        source="sweep.json",
        overrides=tuple(
            Override(name=name, value=value, source="sweep.json")
            for name, value in record.overrides.items()
        ),
        nproc_per_node=nproc_per_node or record.nproc_per_node,
        parallel=record.parallel,
        goal=goal,
        rule=None if record.stop is None else StopRule(eta=record.eta, min_steps=record.min_steps),
    )


def _check_axes(axes: Mapping[str, Sequence[Any]]) -> None:
    """Refuse a grid without settings or values, or with too many.

    Raises:
        UsageError: It is one.
    """
    if not axes:
        raise UsageError(
            "A sweep needs at least one setting with its values, such as lr=0.05,0.1,0.2."
        )
    for name, values in axes.items():
        if not values:
            raise UsageError(f"{brief(name)}: the list of its values is empty. Give at least one.")
    if (count := count_combinations(axes)) > MAX_RUNS:
        factors = " x ".join(str(len(values)) for values in axes.values())
        raise UsageError(
            f"The sweep has {count:,} runs ({factors}), one for each combination of values; a "
            f"sweep has at most {MAX_RUNS:,}. Give fewer values, or several sweeps."
        )


def _build(request: SweepRequest, pairs: Iterable[tuple[str, Any]]) -> BuiltRecipe:
    values = (Override(name=name, value=value, source=request.source) for name, value in pairs)
    return build(request.reference, (*request.overrides, *values))


def _converted_axes(
    axes: Mapping[str, Sequence[Any]], built: Sequence[BuiltRecipe]
) -> tuple[Axis, ...]:
    """Return the values of each setting as the recipe takes them.

    Raises:
        UsageError: A value is given twice, if perhaps in other words, such as 0.1 and 1e-1.
    """
    converted = []
    combinations = combinations_of(axes)
    for place, (name, texts) in enumerate(axes.items()):
        values: list[Any] = []
        for text in texts:
            number = next(
                index for index, pairs in enumerate(combinations) if pairs[place][1] is text
            )
            value = built[number].overrides[name]
            if any(value == other and type(value) is type(other) for other in values):
                raise UsageError(
                    f"{brief(name)} lists {brief(value)} twice, and two runs would be the same. "
                    "Keep one; seed=1,2 repeats a run with other random numbers."
                )
            values.append(value)
        converted.append(Axis(name=name, values=tuple(values)))
    return tuple(converted)


class _Planner:
    """Plans the runs of a sweep; counts the samples once for runs with the same data.

    Args:
        request: The request.
        machine: The machine as one run sees it.
    """

    def __init__(self, request: SweepRequest, machine: Machine) -> None:
        self._request, self._machine = request, machine
        self._counts: dict[str, int] = {}

    def plan(self, index: int, built: BuiltRecipe, axes: Sequence[Axis]) -> SweepTrial:
        """Return one planned run.

        Raises:
            PlanError: The settings contradict each other, or ask for more than there is.
        """
        request = self._request
        overrides = tuple(
            Override(name=name, value=value, source=_SOURCE)
            for name, value in built.overrides.items()
        )
        settings = {axis.name: built.overrides[axis.name] for axis in axes}
        data = str(dict(built.parameters))  # the data of a recipe depends on its parameters alone

        def count(counting: Callable[[], int]) -> int:
            if data not in self._counts:
                self._counts[data] = counting()
            return self._counts[data]

        try:
            _, plan = plan_recipe(
                request.reference,
                overrides,
                self._machine,
                nproc_per_node=request.nproc_per_node,
                count=count,
            )
        except PlanError as error:
            shown = " ".join(f"{name}={value}" for name, value in settings.items())
            raise PlanError(f"{brief(shown)}: {error}") from None
        return SweepTrial(index=index, settings=settings, overrides=overrides, plan=plan)


def _rungs(plans: Sequence[Plan], rule: StopRule) -> tuple[tuple[int, ...], ...]:
    """Return the steps of each run before each choice, each of them followed by an evaluation.

    Raises:
        PlanError: The runs do not evaluate often enough.
    """
    asked = rung_steps([plan.total_steps for plan in plans], rule.eta, rule.min_steps)
    rungs = tuple(
        tuple(next_evaluation(plan, steps) for plan, steps in zip(plans, rung, strict=True))
        for rung in asked
    )
    for number, plan in enumerate(plans):
        steps = [*(rung[number] for rung in rungs), plan.total_steps]
        if len(set(steps)) < len(steps):
            wanted = ", ".join(f"{rung[number]:,}" for rung in asked)
            raise PlanError(
                f"--stop halving compares the runs after {wanted} of {plan.total_steps:,} steps, "
                f"and {plan.recipe} does not evaluate often enough between them. Evaluate more "
                "often, with evaluate_every=STEPS, or give --min-steps or a larger --eta."
            )
    return rungs


def read_grid(grid: object) -> Mapping[str, Sequence[Any]]:
    """Return a grid that a program gives, with a list of values for each setting.

    Raises:
        UsageError: It is something else.
    """
    if not isinstance(grid, Mapping):
        raise UsageError(
            f"grid={brief(repr(grid))}: expected a dictionary of lists, such as "
            '{"lr": [0.1, 0.2]}.'
        )
    axes = {}
    for name, values in grid.items():
        if isinstance(values, (str, bytes, Mapping)) or not isinstance(values, Iterable):
            raise UsageError(
                f"grid: {brief(str(name))} has {brief(repr(values))}; expected a list of values, "
                f"such as [{brief(repr(values))}]."
            )
        axes[str(name)] = list(values)
    return axes


Eta = Annotated[int, Meta(ge=2)]
"""Of every so many runs, one goes on."""

Stop = Literal["halving"]
"""The names of stop rules."""


def rule_of(stop: Stop | None, eta: int, min_steps: int | None) -> StopRule | None:
    """Return the stop rule that the options of a command describe.

    Raises:
        UsageError: An option belongs to a rule that is not asked for.
    """
    if stop is not None:
        return StopRule(eta=eta, min_steps=min_steps)
    if min_steps is not None:
        raise UsageError("--min-steps belongs to a stop rule: add --stop halving.")
    return None
