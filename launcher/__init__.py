"""A distributed training launcher for PyTorch: the GPU count is not a hyper-parameter.

Importing this package imports no torch; that happens when something trains.
"""

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
from launcher.plan import Plan
from launcher.planning import make_plan
from launcher.recipe import Data, Recipe
from launcher.schedule import (
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
    "read_machine",
    "schedule",
    "sgd",
    "warmup",
    "wsd",
]
