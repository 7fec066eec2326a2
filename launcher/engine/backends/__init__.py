"""How ranks work together: one file per engine, behind the seam in base.py."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from launcher.planning.configs import process_environment
from launcher.planning.strategy import STRATEGIES

if TYPE_CHECKING:
    from launcher.engine.backends.base import Backend
    from launcher.environment.world import World
    from launcher.planning.plan import Plan
    from launcher.recipe.recipe import Recipe


def open_backend(recipe: Recipe, plan: Plan, world: World) -> Backend:
    """Return the backend that the plan names; Accelerate and DeepSpeed only for their own.

    Raises:
        WorldError: The processes or the device found are not those planned.
    """
    if plan.backend == "local":
        from launcher.engine.backends.local import LocalBackend

        return LocalBackend(recipe, plan)
    strategy = STRATEGIES[plan.strategy]
    if strategy.uses_deepspeed:
        os.environ.update(process_environment(plan))
        from launcher.engine.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(recipe, plan, world)
    from launcher.engine.backends.accelerate import DDPBackend, FSDPBackend

    return (FSDPBackend if strategy.uses_fsdp else DDPBackend)(recipe, plan, world)
