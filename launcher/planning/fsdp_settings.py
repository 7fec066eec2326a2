"""The settings that belong to FSDP alone: their defaults, and which combinations are refused."""

from __future__ import annotations

from dataclasses import fields
from types import MappingProxyType

from launcher.errors import PlanError
from launcher.recipe.catalogue import written
from launcher.recipe.recipe import Recipe

FSDP_DEFAULTS = MappingProxyType(
    {
        item.name: item.default
        for item in fields(Recipe)
        if item.name
        in (
            "shard",
            "reshard_after_forward",
            "accumulate_unsharded",
            "prefetch_blocks",
            "reduce_dtype",
        )
    }
)
"""The settings that belong to FSDP alone, with their defaults."""


def check_fsdp_settings(recipe: Recipe, *, uses_fsdp: bool) -> None:
    """Refuse settings of FSDP under another strategy, and those that contradict each other.

    Args:
        recipe: The recipe with the settings.
        uses_fsdp: Whether FSDP implements the recipe's strategy.

    Raises:
        PlanError: A setting cannot have an effect, or would make gradients less exact.
    """
    given = [
        f"{name}={written(getattr(recipe, name))}"
        for name, default in FSDP_DEFAULTS.items()
        if getattr(recipe, name) != default
    ]
    if given and not uses_fsdp:
        raise PlanError(
            f"{given[0]} is a setting of strategy=fsdp, and strategy={recipe.strategy} was asked "
            f"for. Use strategy=fsdp, or leave {given[0].partition('=')[0]} out."
        )
    if recipe.reduce_dtype == "bf16" and recipe.precision == "fp64":
        raise PlanError(
            "reduce_dtype=bf16 rounds gradients to 8 bits, and precision=fp64 was asked for. Leave "
            "one of them out."
        )
    if recipe.accumulate_unsharded and recipe.reduce_dtype == "bf16":
        raise PlanError(
            "accumulate_unsharded=true adds the gradients of micro-steps in the precision in which "
            "they are reduced, and reduce_dtype=bf16 would lose what a micro-step adds. Leave one "
            "of them out."
        )
    if recipe.accumulate_unsharded and recipe.noise_scale:
        raise PlanError(
            "noise_scale=true measures the gradient of the first micro-step over all ranks, and "
            "accumulate_unsharded=true reduces gradients only after the last one. Leave one of "
            "them out."
        )
    if recipe.exact:
        _check_exact(recipe)


def _check_exact(recipe: Recipe) -> None:
    """Refuse settings of FSDP with which sums would depend on the number of ranks.

    Raises:
        PlanError: There is one.
    """
    if recipe.reduce_dtype == "bf16":
        raise PlanError(
            "exact=true makes sums independent of the number of ranks, and reduce_dtype=bf16 "
            "rounds the gradients of each rank before they are added. Leave one of them out."
        )
    if recipe.accumulate_unsharded:
        raise PlanError(
            "exact=true exchanges the gradients of each virtual rank by themselves, and "
            "accumulate_unsharded=true adds them on each rank first. Leave accumulate_unsharded "
            "out: the micro-batches of a virtual rank are always added before the exchange."
        )
