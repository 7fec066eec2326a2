"""How ranks work together: one file per way, behind the seam in base.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.engine.backends.base import Backend
    from launcher.plan import Plan
    from launcher.world import World


def open_backend(plan: Plan, world: World) -> Backend:
    """Return the backend that the plan names; Accelerate is imported only for its own.

    Raises:
        WorldError: The processes or the device found are not those planned.
    """
    if plan.backend == "local":
        from launcher.engine.backends.local import LocalBackend

        return LocalBackend(plan)
    from launcher.engine.backends.accelerate import AccelerateBackend

    return AccelerateBackend(plan, world)
