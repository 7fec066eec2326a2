"""Join the process group of a run, and make sure that all ranks have the same plan."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from launcher.engine.backends import open_backend
from launcher.engine.backends.base import Backend
from launcher.environment.world import World
from launcher.errors import LauncherError, WorldError
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Recipe
from launcher.runs.rundir import RunDir


def join(
    recipe: Recipe,
    plan: Plan,
    world: World,
    make_run_dir: Callable[[], RunDir],
    *,
    report: Callable[[], object] = lambda: None,
) -> tuple[Backend, RunDir]:
    """Join the process group, compare the plans of its ranks, share the run folder (collective).

    Args:
        recipe: What is trained.
        plan: This rank's plan.
        world: This process's place among the ranks.
        make_run_dir: Called on rank 0 only; its result is broadcast to every rank.
        report: Called once the ranks have met, before they communicate for the first time.

    Raises:
        WorldError: The world or the recipe is not the planned one, or the ranks have different
            plans.
        LauncherError: `make_run_dir` raised it on rank 0.
    """
    plan.check_world(world)
    plan.check_recipe(recipe)
    torch.set_num_threads(plan.threads_per_rank)
    backend = open_backend(recipe, plan, world)
    report()
    from_rank_0: dict[str, Any] = {}
    if world.rank == 0:
        try:
            from_rank_0 = {"plan": plan.agreement(), "run_dir": make_run_dir()}
        except LauncherError as error:
            from_rank_0 = {"error": error}
    from_rank_0 = backend.broadcast(from_rank_0)
    if "error" in from_rank_0:
        raise from_rank_0["error"]
    differences = plan.differences(from_rank_0["plan"])
    if backend.any_rank(bool(differences)):
        texts = backend.gather(_describe_difference(world, differences))
        raise WorldError(next(filter(None, texts)))
    return backend, from_rank_0["run_dir"]


def _describe_difference(world: World, differences: dict[str, tuple[Any, Any]]) -> str:
    """Return the error for the first difference between this rank's plan and rank 0's, or ""."""
    if not differences:
        return ""
    name, (own, rank_0) = next(iter(differences.items()))
    return (
        f"Rank {world.rank} was started with {name}={own}, and rank 0 with {name}={rank_0}. "
        "Start every rank with the same recipe and the same overrides."
    )
