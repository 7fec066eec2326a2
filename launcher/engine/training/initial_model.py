"""Build the recipe's model, so that no rank needs memory for what it does not keep.

Where a strategy shards weights, or where they move to a GPU, the model is built without values
(deferred.py), and the backend has them computed one parameter at a time when it has sharded it. A
model that cannot be built so is built with its values by one rank of a node after the other; each
keeps its own parts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from launcher.engine.backends.base import Backend
from launcher.engine.data.randomness import seed_all
from launcher.engine.model.apparent_device import CannotDeferError
from launcher.engine.model.deferred import defer
from launcher.engine.model.lazy import initialize_lazy_layers, lazy_names
from launcher.engine.saving.stored_weights import StoredWeights, WeightsBefore
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.fragments import Box
from launcher.engine.state.initial_values import (
    InitialValues,
    OwnPart,
    parts_of,
    value_checksum,
    whole_box,
)
from launcher.engine.state.meta_tensors import move_to_meta
from launcher.errors import RecipeError
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.printable import kind_of
from launcher.recipe.function_checks import note_call
from launcher.recipe.recipe import Recipe


def build_initial_model(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    first_batch: Callable[[], Any],
    *,
    is_restored: bool = False,
) -> tuple[nn.Module, InitialValues | None]:
    """Build the recipe's model (collective).

    Args:
        recipe: The recipe.
        plan: The plan of the run.
        backend: This rank among the others.
        first_batch: Reads the batch with which lazy layers are initialised.
        is_restored: Whether a checkpoint will replace all parameters.

    Returns:
        The model with its values, and None; or the model on the meta device, and its values.

    Raises:
        RecipeError: The model function is at fault, or the recipe's `weights` do not fit the model.
    """
    shards = STRATEGIES[plan.strategy].shards_parameters
    built: tuple[nn.Module, InitialValues | None] | None = None
    if shards or plan.device != "cpu":
        built = _build_without_values(recipe, backend, tells=shards)
    if built is None and shards:
        built = backend.in_turns(
            "built the model", lambda: _keep_parts(build_model(recipe, first_batch), backend)
        )
    elif built is None:
        built = backend.local_rank_zero_first(
            "built the model", lambda: (build_model(recipe, first_batch), None)
        )
    backend.wait_for_all("built the model")
    model, values = built
    if is_restored:
        return model, None if values is None else _BuffersOf(values, model)
    if recipe.weights is None:
        return model, values
    if values is None:
        load_weights(recipe, recipe.weights, model)
        return model, None
    stored = StoredWeights(recipe.weights, model, strict=recipe.strict_weights)
    return model, WeightsBefore(stored, values)


def _build_without_values(
    recipe: Recipe, backend: Backend, *, tells: bool
) -> tuple[nn.Module, InitialValues] | None:
    """Return the recipe's model on the meta device, and its values (collective).

    Args:
        recipe: The recipe.
        backend: This rank among the others.
        tells: Whether to print why a model cannot be built so.

    Returns:
        The model and its values; None on all ranks if one of them cannot build it so.
    """
    attempt = backend.local_rank_zero_first("built the model", lambda: try_to_defer(recipe))
    backend.wait_for_all("built the model")
    reasons = backend.gather(attempt if isinstance(attempt, str) else None)
    reason = next(filter(None, reasons), None)
    if not isinstance(attempt, str) and reason is None:
        return attempt
    if tells and backend.rank == 0:
        print(
            f"launcher: the model function cannot be recorded: {reason}. The ranks of a node build "
            "the model one after the other.",
            flush=True,
        )
    return None


def try_to_defer(recipe: Recipe) -> tuple[nn.Module, InitialValues] | str:
    """Return the recipe's model without values, and its values; or why that is not possible."""
    try:
        return defer(lambda: _call_model_function(recipe))
    except CannotDeferError as error:
        return str(error)


def build_model(recipe: Recipe, first_batch: Callable[[], Any]) -> nn.Module:
    """Call the recipe's model function, with seeded generators, and initialise lazy layers.

    Args:
        recipe: The recipe.
        first_batch: Reads the batch with which lazy layers are initialised.

    Raises:
        RecipeError: The function did not return a module, a lazy layer stays without a shape, or a
            parameter has no values.
    """
    model = _call_model_function(recipe)
    if lazy_names(model):
        initialize_lazy_layers(model, recipe, first_batch())
    if on_meta := [name for name, tensor in model.named_parameters() if tensor.is_meta]:
        raise RecipeError(
            f"The recipe's model has {len(on_meta)} parameters on the meta device, which have no "
            f"values, {on_meta[0]} first. Return a model on the CPU, with its weights."
        )
    return model


def _call_model_function(recipe: Recipe) -> nn.Module:
    seed_all(recipe.seed)  # the same initial weights on every rank
    try:
        model = recipe.model()
    except Exception as error:
        note_call(error, "The recipe's model function")
        raise
    if not isinstance(model, nn.Module):
        raise RecipeError(
            f"The recipe's model function returned {kind_of(model)}; expected a torch.nn.Module."
        )
    if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        raise RecipeError(
            f"The recipe's model function returned {kind_of(model)}, which divides batches among "
            "GPUs or ranks. launcher does that itself: return the model without this wrapper."
        )
    return model


def load_weights(recipe: Recipe, weights: str, model: nn.Module) -> None:
    """Replace the values of a model by those in the files that the recipe's `weights` names.

    Raises:
        RecipeError: The files do not fit the model.
    """
    StoredWeights(weights, model, strict=recipe.strict_weights).read(parts_of(model))


@dataclass(kw_only=True)
class _KeptParts:
    """A rank's parts of a model that was built with its values."""

    pieces: dict[str, list[tuple[Box, Tensor]]]
    checksums: dict[str, int] = field(default_factory=dict)

    def fill(self, parts: Mapping[str, OwnPart]) -> None:
        for name, part in parts.items():
            kept = self.pieces[name]
            for box, memory in part.pieces:
                source = next((k for k in kept if _contains(k[0], box)), None)
                if source is None:
                    raise RuntimeError(f"This rank did not keep its part of {name}.")
                start = [b - k for b, k in zip(box.offsets, source[0].offsets, strict=True)]
                inner = tuple(slice(s, s + n) for s, n in zip(start, box.sizes, strict=True))
                with torch.no_grad():
                    memory.copy_(source[1][inner])
            del self.pieces[name]


class _BuffersOf:
    """The values of a model's buffers alone.

    A buffer that is not saved is in no checkpoint, and the parameters will be read from one.

    Args:
        values: The values of the model.
        model: The model.
    """

    def __init__(self, values: InitialValues, model: nn.Module) -> None:
        self._values = values
        self._buffers = {plain_name(n) for n, _ in model.named_buffers(remove_duplicate=False)}
        self.checksums: dict[str, int] = {}

    def fill(self, parts: Mapping[str, OwnPart]) -> None:
        self._values.fill({name: part for name, part in parts.items() if name in self._buffers})


def _contains(outer: Box, inner: Box) -> bool:
    return all(
        o <= i and i + n <= o + m
        for o, m, i, n in zip(outer.offsets, outer.sizes, inner.offsets, inner.sizes, strict=True)
    )


def _keep_parts(model: nn.Module, backend: Backend) -> tuple[nn.Module, _KeptParts | None]:
    """Return a model without its values, and this rank's parts of them.

    A model with parameters of unknown classes keeps its values, and there are no parts.
    """
    if any(type(tensor) not in (nn.Parameter, Tensor) for tensor in _registered(model).values()):
        return model, None
    kept = _KeptParts(pieces={})
    parameters = {plain_name(name) for name, _ in model.named_parameters(remove_duplicate=False)}
    shared: dict[int, list[tuple[Box, Tensor]]] = {}
    for name, tensor in _registered(model).items():
        if id(tensor) not in shared:
            own = (
                backend.own_boxes(tensor.shape) if name in parameters else [whole_box(tensor.shape)]
            )
            shared[id(tensor)] = [(box, tensor.detach()[box.slices].clone()) for box in own]
        kept.pieces[name] = shared[id(tensor)]
        if name in parameters:
            kept.checksums[name] = value_checksum(tensor)
    move_to_meta(model)
    return model, kept


def _registered(model: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers of a model under all their names."""
    return {
        plain_name(name): tensor
        for name, tensor in (
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        )
    }
