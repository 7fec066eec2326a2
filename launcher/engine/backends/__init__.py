"""How ranks train together: one module per backend, behind the interface in base.py.

base                 `Backend`, the interface that the training loop calls
local                one process without a process group
accelerate           the process group, and DistributedDataParallel
fsdp                 FSDP
deepspeed            ZeRO stages 1 to 3
exact                sums over virtual ranks in a fixed order, on one process
exact_ddp            the same under DistributedDataParallel
exact_fsdp           the same under FSDP
exact_norm           a gradient norm that does not depend on how the gradient is split
placement            the rank's device, and copies of batches to it
compute_timer        times of a rank's own passes on the clock of its GPU
call_order           detects ranks that gather weights in different orders (FSDP, ZeRO-3)
reduction_order      makes ZeRO-1 and ZeRO-2 reduce gradients in one order on every rank
unused_parameters    zero gradients for parameters that a rank did not use (DDP)
"""

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
    """Return the backend that the plan names.

    Accelerate and DeepSpeed are imported only for the backends that need them.

    Raises:
        WorldError: The processes or the device differ from what was planned.
    """
    if plan.backend == "local" and plan.exact:
        from launcher.engine.backends.exact import ExactLocalBackend

        return ExactLocalBackend(recipe, plan)
    if plan.backend == "local":
        from launcher.engine.backends.local import LocalBackend

        return LocalBackend(recipe, plan)
    strategy = STRATEGIES[plan.strategy]
    if strategy.uses_deepspeed:
        os.environ.update(process_environment(plan))
        from launcher.engine.backends.deepspeed import DeepSpeedBackend

        return DeepSpeedBackend(recipe, plan, world)
    if strategy.uses_fsdp:
        return _open_fsdp(recipe, plan, world)
    if plan.exact:
        from launcher.engine.backends.exact_ddp import ExactDDPBackend

        return ExactDDPBackend(recipe, plan, world)
    from launcher.engine.backends.accelerate import DDPBackend

    return DDPBackend(recipe, plan, world)


def _open_fsdp(recipe: Recipe, plan: Plan, world: World) -> Backend:
    if plan.exact:
        from launcher.engine.backends.exact_fsdp import ExactFSDPBackend

        return ExactFSDPBackend(recipe, plan, world)
    from launcher.engine.backends.fsdp import FSDPBackend

    return FSDPBackend(recipe, plan, world)
