"""A distributed training launcher for PyTorch: the GPU count is not a hyper-parameter.

Importing this package imports nothing; each name is fetched from its module when it is first used,
and torch when something trains.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.engine.shards import Shards
    from launcher.entry import main
    from launcher.errors import (
        LauncherError,
        OverrideError,
        PlanError,
        RecipeError,
        RunDirError,
        SampleError,
        TrainingError,
        UsageError,
        WorldError,
    )
    from launcher.loading import LoaderPolicy, loader_policy
    from launcher.machine import Machine, read_machine
    from launcher.optimizer import OptimizerSpec, adamw, sgd
    from launcher.packaged import packaged_file
    from launcher.plan import Plan
    from launcher.planning import make_plan
    from launcher.recipe import Data, Recipe
    from launcher.schedules import (
        Schedule,
        Setting,
        constant,
        cosine,
        cyclical,
        exponential,
        linear,
        multi_step,
        one_cycle,
        schedule,
        warmup,
        wsd,
    )

__all__ = [
    "Data",
    "LauncherError",
    "LoaderPolicy",
    "Machine",
    "OptimizerSpec",
    "OverrideError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "RunDirError",
    "SampleError",
    "Schedule",
    "Setting",
    "Shards",
    "TrainingError",
    "UsageError",
    "WorldError",
    "adamw",
    "constant",
    "cosine",
    "cyclical",
    "exponential",
    "linear",
    "loader_policy",
    "main",
    "make_plan",
    "multi_step",
    "one_cycle",
    "packaged_file",
    "read_machine",
    "schedule",
    "sgd",
    "warmup",
    "wsd",
]

_MODULES = {
    "Data": "recipe",
    "LoaderPolicy": "loading",
    "Machine": "machine",
    "OptimizerSpec": "optimizer",
    "Plan": "plan",
    "Recipe": "recipe",
    "Shards": "engine.shards",
    "adamw": "optimizer",
    "loader_policy": "loading",
    "main": "entry",
    "make_plan": "planning",
    "packaged_file": "packaged",
    "read_machine": "machine",
    "sgd": "optimizer",
}
"""Where public names are; the errors are in `errors`, the others in `schedules`."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    home = _MODULES.get(name) or ("errors" if name.endswith("Error") else "schedules")
    value = getattr(importlib.import_module(f"launcher.{home}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
