"""What the objectives of a recipe are trained with, on one rank."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass

from torch import nn
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.data.randomness import seed_all
from launcher.engine.metrics.noise_meter import NoiseMeter, NullNoiseMeter
from launcher.engine.model.forward_writes import ForwardWrites
from launcher.engine.optimizers.joint import JointOptimizer
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.state.initial_values import InitialValues
from launcher.engine.state.training_state import parameters
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.recipe.objective import assign_parameters
from launcher.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class TrainedObjective:
    """What one objective takes its turns with. A recipe with one loss has one of them."""

    name: str
    """Its name; empty if the recipe has one loss."""

    number: int
    """Its place in the recipe, from 0, on which its random numbers depend."""

    every: int
    """It takes its turn in one step of so many."""

    recipe: Recipe
    """The recipe with the loss of this objective alone."""

    lr: float
    """The planned peak learning rate."""

    backend: Backend
    """Computes its gradients and takes its steps."""

    model: nn.Module
    """The module that the backend's `forward` takes."""

    optimizer: Optimizer
    forward_writes: ForwardWrites
    noise_meter: NoiseMeter
    begin: Callable[[], None] | None = None
    """Lets its parameters alone require a gradient; None if there is no other objective."""


def prepare_objectives(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    model: nn.Module,
    blocks: list[nn.Module],
    initial: InitialValues | None,
) -> tuple[nn.Module, Optimizer, tuple[TrainedObjective, ...]]:
    """Place a model on this rank with the optimizers of all objectives (collective).

    Args:
        recipe: A recipe with objectives.
        plan: Its plan.
        backend: This rank among the others, which takes the turns of the first objective.
        model: The recipe's model, on the CPU with its values, or on the meta device.
        blocks: Modules of the model that may be sharded separately.
        initial: The values of a model on the meta device.

    Returns:
        The module that `backend.forward` takes, the optimizers as one, and the objectives.

    Raises:
        RecipeError: The patterns of the objectives do not fit the parameters of the model, or an
            optimizer updates parameters of another objective.
    """
    own_names = [set(names) for names in trained_names(recipe, model)]
    trained = sorted(set().union(*own_names))
    alone = recipe.by_objective()

    def select(module: nn.Module, number: int) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return the parameters of an objective, and those of the others."""
        named = parameters(module)
        own = [named[name] for name in trained if name in own_names[number]]
        return own, [named[name] for name in trained if name not in own_names[number]]

    def optimizer_for(number: int) -> Callable[[nn.Module], Optimizer]:
        def make(module: nn.Module) -> Optimizer:
            seed_all(recipe.seed)
            optimizer = make_optimizer(alone[number], module, plan.objectives[number].lr)
            name = recipe.objectives[number].name
            _check_own(name, optimizer, module, set(select(module, number)[1]))
            return optimizer

        return make

    backend.of_objectives = frozenset(trained)
    for parameter in select(model, 0)[1]:
        parameter.requires_grad_(False)
    backend.recipe, backend.compute_timer = alone[0], None
    wrapped, first = backend.prepare(model, blocks, optimizer_for(0), initial)
    module = backend.unwrap(wrapped)
    prepared: list[tuple[Backend, nn.Module, Optimizer]] = [(backend, wrapped, first)]
    for number in range(1, len(alone)):
        backend.require_gradients(wrapped, *select(module, number))
        prepared.append(backend.for_objective(alone[number], wrapped, optimizer_for(number)))
    objectives = tuple(
        TrainedObjective(
            name=objective.name,
            number=number,
            every=objective.every,
            recipe=alone[number],
            lr=plan.objectives[number].lr,
            backend=own_backend,
            model=own_wrapped,
            optimizer=optimizer,
            forward_writes=ForwardWrites(own_wrapped, backend, recipe.rank_buffers),
            noise_meter=NullNoiseMeter(),
            begin=functools.partial(backend.require_gradients, wrapped, *select(module, number)),
        )
        for number, (objective, (own_backend, own_wrapped, optimizer)) in enumerate(
            zip(recipe.objectives, prepared, strict=True)
        )
    )
    joint = JointOptimizer({each.name: each.optimizer for each in objectives})
    return wrapped, joint, objectives


def trained_names(recipe: Recipe, model: nn.Module) -> list[tuple[str, ...]]:
    """Return the names of the parameters that each objective trains, or the one loss.

    Args:
        recipe: The recipe.
        model: Its model, in which every parameter that is trained requires a gradient.

    Raises:
        RecipeError: The patterns of the objectives do not fit the parameters of the model.
    """
    first_names = {parameter: name for name, parameter in parameters(model).items()}
    trained: dict[str, str] = {}
    frozen: list[str] = []
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            trained[plain_name(name)] = first_names[parameter]
        else:
            frozen.append(plain_name(name))
    if not recipe.objectives:
        return [tuple(dict.fromkeys(trained.values()))]
    return list(assign_parameters(recipe.objectives, trained, frozen).values())


@contextlib.contextmanager
def only_trained(model: nn.Module, names: Collection[str]) -> Iterator[None]:
    """Let no other parameters than these require a gradient, in this context."""
    others = [
        parameter
        for name, parameter in parameters(model).items()
        if parameter.requires_grad and name not in names
    ]
    for parameter in others:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in others:
            parameter.requires_grad_(True)


def _check_own(
    name: str, optimizer: Optimizer, model: nn.Module, others: set[nn.Parameter]
) -> None:
    """Refuse an optimizer that holds parameters of other objectives.

    Raises:
        RecipeError: It does.
    """
    held = {parameter for group in optimizer.param_groups for parameter in group["params"]}
    foreign = [
        other for other, parameter in parameters(model).items() if parameter in held & others
    ]
    if foreign:
        more = f" and {len(foreign) - 1:,} more" if foreign[1:] else ""
        raise RecipeError(
            f"The optimizer of the objective {name} updates {foreign[0]}{more}, which it does not "
            "train. Its parameters are those that require a gradient while the optimizer function "
            "is called: [p for p in model.parameters() if p.requires_grad]."
        )
