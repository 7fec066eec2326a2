"""A distributed training launcher for PyTorch: the GPU count is not a hyper-parameter.

A recipe is a function that returns `Recipe(...)`; `main(recipe)` at the end of its file trains it
as one rank, and `launcher run` starts all ranks. `make_plan` works out every number of a run before
anything starts. Rooms, from the bottom to the top: `recipe`, `environment`, `planning`, `runs`,
`analysis`, `console`, `slurm`, `engine`, `launch`, `tuning`, `checks`, `report`, `cli`.

Importing this package imports no submodule. A public name is imported with its module on first use,
and torch only when something trains.
"""

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.api import plan, resume, run
    from launcher.engine.data.shards import Shards
    from launcher.engine.model.four_bits import four_bits
    from launcher.entry import main
    from launcher.environment.machine import Machine, read_machine
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
    from launcher.planning.loading import LoaderPolicy, loader_policy
    from launcher.planning.plan import Plan
    from launcher.planning.planner import make_plan
    from launcher.recipe.objective import Objective
    from launcher.recipe.optimizer import OptimizerSpec, adamw, muon, schedule_free, sgd
    from launcher.recipe.package_data import packaged_file
    from launcher.recipe.recipe import Data, Recipe
    from launcher.recipe.schedules import (
        Schedule,
        ScheduleValue,
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
    from launcher.runs.failure_record import Failure, RunFailedError
    from launcher.runs.history import History
    from launcher.runs.run_result import RunResult
    from launcher.runs.rundir import RunDir

__all__ = [
    "Data",
    "Failure",
    "History",
    "LauncherError",
    "LoaderPolicy",
    "Machine",
    "Objective",
    "OptimizerSpec",
    "OverrideError",
    "Plan",
    "PlanError",
    "Recipe",
    "RecipeError",
    "RunDir",
    "RunDirError",
    "RunFailedError",
    "RunResult",
    "SampleError",
    "Schedule",
    "ScheduleValue",
    "Shards",
    "TrainingError",
    "UsageError",
    "WorldError",
    "adamw",
    "constant",
    "cosine",
    "cyclical",
    "exponential",
    "four_bits",
    "linear",
    "loader_policy",
    "main",
    "make_plan",
    "multi_step",
    "muon",
    "one_cycle",
    "packaged_file",
    "plan",
    "read_machine",
    "resume",
    "run",
    "schedule",
    "schedule_free",
    "sgd",
    "warmup",
    "wsd",
]

_MODULES = {
    "Data": "launcher.recipe.recipe",
    "Failure": "launcher.runs.failure_record",
    "History": "launcher.runs.history",
    "LauncherError": "launcher.errors",
    "LoaderPolicy": "launcher.planning.loading",
    "Machine": "launcher.environment.machine",
    "Objective": "launcher.recipe.objective",
    "OptimizerSpec": "launcher.recipe.optimizer",
    "OverrideError": "launcher.errors",
    "Plan": "launcher.planning.plan",
    "PlanError": "launcher.errors",
    "Recipe": "launcher.recipe.recipe",
    "RecipeError": "launcher.errors",
    "RunDir": "launcher.runs.rundir",
    "RunDirError": "launcher.errors",
    "RunFailedError": "launcher.runs.failure_record",
    "RunResult": "launcher.runs.run_result",
    "SampleError": "launcher.errors",
    "Schedule": "launcher.recipe.schedules",
    "ScheduleValue": "launcher.recipe.schedules",
    "Shards": "launcher.engine.data.shards",
    "TrainingError": "launcher.errors",
    "UsageError": "launcher.errors",
    "WorldError": "launcher.errors",
    "adamw": "launcher.recipe.optimizer",
    "constant": "launcher.recipe.schedules",
    "cosine": "launcher.recipe.schedules",
    "cyclical": "launcher.recipe.schedules",
    "exponential": "launcher.recipe.schedules",
    "four_bits": "launcher.engine.model.four_bits",
    "linear": "launcher.recipe.schedules",
    "loader_policy": "launcher.planning.loading",
    "main": "launcher.entry",
    "make_plan": "launcher.planning.planner",
    "multi_step": "launcher.recipe.schedules",
    "muon": "launcher.recipe.optimizer",
    "one_cycle": "launcher.recipe.schedules",
    "packaged_file": "launcher.recipe.package_data",
    "plan": "launcher.api",
    "read_machine": "launcher.environment.machine",
    "resume": "launcher.api",
    "run": "launcher.api",
    "schedule": "launcher.recipe.schedules",
    "schedule_free": "launcher.recipe.optimizer",
    "sgd": "launcher.recipe.optimizer",
    "warmup": "launcher.recipe.schedules",
    "wsd": "launcher.recipe.schedules",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(f"module 'launcher' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
