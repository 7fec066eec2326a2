"""`Objective`: one of several losses of a recipe, each with parameters and an optimizer of its own.

A recipe with a generator and a discriminator, a teacher and a student, or an actor and a critic has
a list of them in place of one loss. Which parameters an objective trains is settled here, by names
alone.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from launcher.errors import RecipeError, did_you_mean
from launcher.recipe.field_docs import with_field_docs
from launcher.recipe.function_checks import ARGUMENTS, check_function, check_optimizer
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.schedules import Schedule, hint_for_function
from launcher.recipe.validation import MismatchError, PositiveFloat, PositiveInt, convert, show

_PLAIN = ("name", "lr", "max_grad_norm", "every", "shares")
"""Fields with plain values, which are converted to their types."""

INHERITED = ("forward", "optimizer", "schedule", "lr", "max_grad_norm")
"""Fields that an objective takes from its recipe where they are None."""


def no_loss(outputs: Any, batch: Any) -> tuple[Any, Any]:
    """Stand for the loss of a recipe that gives none; `Recipe` replaces or refuses it."""
    raise NotImplementedError


@with_field_docs
@dataclass(frozen=True, kw_only=True)
class Objective:
    """One of several objectives of a recipe: a loss, and the parameters that it trains.

    In each step the objectives take their turns, in the order of `Recipe.objectives`. A turn passes
    the whole global batch through the model, computes the gradient of the objective's own
    parameters, and takes a step of its optimizer. A later objective sees the parameters that the
    earlier ones have updated. Parameters of other objectives do not require a gradient in a turn.
    """

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,99}\Z")]
    """Name of the objective: letters, digits, dots, dashes and underscores."""

    loss: Callable[[Any, Any], tuple[Any, Any]]
    """Function (outputs, batch) -> (sum, count), like `Recipe.loss`."""

    parameters: str | Sequence[str]
    """Patterns of the names of the parameters that it trains, such as `generator.*`."""

    forward: Callable[[Any, Any], Any] | None = None
    """Function (model, batch) -> outputs; None is that of the recipe."""

    optimizer: OptimizerSpec | Callable[[Any, float], Any] | None = None
    """sgd(...), adamw(...), or a function (model, lr) -> torch optimizer; None is that of the
    recipe. While the function is called, the objective's parameters alone require a gradient."""

    schedule: Schedule | None = None
    """How the learning rate changes over the run; None is that of the recipe."""

    lr: PositiveFloat | None = None
    """Peak learning rate at a batch size of `Recipe.lr_batch_size`; None is that of the recipe."""

    max_grad_norm: PositiveFloat | None = None
    """Maximum norm of the gradient of its parameters; None is that of the recipe."""

    every: PositiveInt = 1
    """It takes its turn in one step of so many, beginning with the first."""

    shares: bool = False
    """Whether it may train parameters that an earlier objective trains as well."""

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for name in _PLAIN:
            try:
                object.__setattr__(self, name, convert(getattr(self, name), hints[name]))
            except MismatchError as error:
                raise RecipeError(f"Objective({name}=...): {error}.") from None
        place = f"Objective({self.name!r}, {{}}=...)"
        check_function(place.format("loss"), self.loss, ARGUMENTS["loss"])
        if self.forward is not None:
            check_function(place.format("forward"), self.forward, ARGUMENTS["forward"])
        if self.optimizer is not None:
            check_optimizer(self.optimizer, place.format("optimizer"))
        if not (self.schedule is None or isinstance(self.schedule, Schedule)):
            raise RecipeError(
                f"{place.format('schedule')}: expected a schedule such as one_cycle(), found "
                f"{show(self.schedule)}.{hint_for_function(self.schedule)}"
            )
        patterns = (self.parameters,) if isinstance(self.parameters, str) else self.parameters
        if (
            not isinstance(patterns, Sequence)
            or not patterns
            or not all(isinstance(pattern, str) and pattern for pattern in patterns)
        ):
            raise RecipeError(
                f"{place.format('parameters')}: expected patterns of the names of parameters, such "
                f"as 'generator.*', found {show(self.parameters)}."
            )
        object.__setattr__(self, "parameters", tuple(patterns))

    def __str__(self) -> str:
        """Return the objective with the settings that differ from their defaults, on one line."""
        given = [
            f"{item.name}={_written(getattr(self, item.name))}"
            for item in fields(self)
            if item.name not in ("name", "loss") and getattr(self, item.name) != item.default
        ]
        return f"{self.name}({', '.join(given)})"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return " ".join(value)
    if callable(value) and not isinstance(value, (OptimizerSpec, Schedule)):
        return "..."
    return f"{value:g}" if isinstance(value, float) else str(value).lower()


def check_objectives(objectives: Any) -> tuple[Objective, ...]:
    """Return the objectives of a recipe as a tuple.

    Raises:
        RecipeError: They are no list of objectives with different names, or some steps would have
            none.
    """
    if isinstance(objectives, Objective) or not isinstance(objectives, Sequence):
        raise RecipeError(
            "Recipe(objectives=...): expected a list of objectives, such as (Objective(...), "
            f"Objective(...)), found {show(objectives)}."
        )
    for objective in objectives:
        if not isinstance(objective, Objective):
            raise RecipeError(
                "Recipe(objectives=...): expected launcher.Objective(...) for each item, found "
                f"{show(objective)}."
            )
    names = [objective.name for objective in objectives]
    if repeated := next((name for name in names if names.count(name) > 1), None):
        raise RecipeError(
            f"Recipe(objectives=...): {names.count(repeated)} objectives are called {repeated!r}. "
            "Give each one a name of its own, under which its loss is reported."
        )
    if objectives and all(objective.every > 1 for objective in objectives):
        found = ", ".join(f"{objective.name} every={objective.every}" for objective in objectives)
        raise RecipeError(
            f"Recipe(objectives=...): no objective takes its turn in every step ({found}), so "
            "that some steps would read a batch and train nothing. Give one of them every=1."
        )
    return tuple(objectives)


def measured_objective(
    objectives: Sequence[Objective], forward: Callable[[Any, Any], Any]
) -> Objective | None:
    """Return the objective in whose turns `train_metrics` are computed; None if there is none.

    It is the first with a turn in every step that has the outputs of the recipe's forward, which
    the metrics of an evaluation receive.
    """
    return next(
        (each for each in objectives if each.every == 1 and each.forward in (None, forward)), None
    )


def assign_parameters(
    objectives: Sequence[Objective], trained: Mapping[str, str], frozen: Collection[str]
) -> dict[str, tuple[str, ...]]:
    """Return the names of the parameters that each objective trains, by the objective's name.

    Args:
        objectives: The objectives of a recipe.
        trained: The names of all parameters that require a gradient. A parameter with several
            names has an entry for each, with the name that is returned.
        frozen: The names of the other parameters.

    Raises:
        RecipeError: A pattern matches no parameter that requires a gradient, an objective trains
            parameters of an earlier one and does not say so, or a parameter belongs to none.
    """
    assigned: dict[str, tuple[str, ...]] = {}
    owners: dict[str, str] = {}
    for objective in objectives:
        names: dict[str, None] = {}
        for pattern in objective.parameters:
            matches = [trained[name] for name in fnmatch.filter(trained, pattern)]
            if not matches:
                raise _unmatched(objective, pattern, trained, frozen)
            names |= dict.fromkeys(matches)
        shared = [name for name in names if name in owners]
        if shared and not objective.shares:
            raise RecipeError(
                f"The objectives {owners[shared[0]]} and {objective.name} both train "
                f"{_counted(shared)}. Narrow the patterns of one of them, or say "
                f"Objective({objective.name!r}, shares=True, ...), with which each updates them in "
                "its own turn with its own optimizer."
            )
        owners = dict.fromkeys(names, objective.name) | owners
        assigned[objective.name] = tuple(names)
    if untrained := [name for name in dict.fromkeys(trained.values()) if name not in owners]:
        raise RecipeError(
            f"No objective trains {_counted(untrained)}. Add a pattern to the parameters of an "
            "objective, or freeze what is not to be trained with requires_grad_(False) in the "
            "model function."
        )
    return assigned


def _unmatched(
    objective: Objective, pattern: str, trained: Collection[str], frozen: Collection[str]
) -> RecipeError:
    """Return the error about a pattern that matches no parameter that requires a gradient."""
    asked = f"Objective({objective.name!r}, parameters=...): the pattern {pattern!r} matches"
    if still := fnmatch.filter(frozen, pattern):
        return RecipeError(
            f"{asked} {_counted(still)}, and none of them requires a gradient. Leave "
            "requires_grad_(False) out of the model function, or leave the pattern out: what no "
            "objective trains stays as it is."
        )
    known = dict.fromkeys(_patterns_of(trained))
    hint = did_you_mean(pattern, known)
    modules = ", ".join([name for name in known if name.count(".") == 1 and name[-1] == "*"][:8])
    begins = f" The names begin with {modules}." if modules and not hint else ""
    return RecipeError(f"{asked} no parameter of the model.{hint or begins}")


def _patterns_of(names: Collection[str]) -> Iterator[str]:
    """Yield names of parameters, and a pattern for each module that contains some."""
    for name in names:
        modules = name.split(".")[:-1]
        yield from (".".join([*modules[: depth + 1], "*"]) for depth in range(len(modules)))
        yield name


def _counted(names: Sequence[str]) -> str:
    more = f" and {len(names) - 1:,} more" if names[1:] else ""
    return f"{names[0]}{more}"
