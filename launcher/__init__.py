"""A distributed training launcher for PyTorch: the GPU count is not a hyper-parameter.

A recipe is a function that returns `Recipe(...)`; `main(recipe)` at the end of its file trains it
as one rank, and `launcher run` starts all ranks. `make_plan` works out every number of a run before
anything starts. Rooms, from the bottom to the top: `recipe`, `environment`, `planning`, `runs`,
`analysis`, `console`, `slurm`, `engine`, `launch`, `tuning`, `checks`, `sweeps`, `report`, `cli`.

Importing this package imports no submodule. A public name is imported with its module on first use,
and torch only when something trains.
"""

import importlib
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from launcher.api import evaluate, objective, plan, predict, resume, run, sweep
    from launcher.engine.data.mixture import Mixture, Source
    from launcher.engine.data.packed import Packed, attention_mask, cumulative_lengths
    from launcher.engine.data.remote import RemoteCache
    from launcher.engine.data.shards import Shards
    from launcher.engine.data.stores.image_folder import ImageFolder
    from launcher.engine.data.stores.lit import LitShards
    from launcher.engine.data.stores.lmdb import LMDBSamples
    from launcher.engine.data.stores.mosaic import MosaicShards
    from launcher.engine.data.stores.parquet import ParquetRows
    from launcher.engine.data.stores.sqlite import SQLiteRows
    from launcher.engine.data.stores.tokens import TokenFiles
    from launcher.engine.data.streams import Stream
    from launcher.engine.data.weighted import weighted
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
    from launcher.launch.predict_run import Predictions
    from launcher.planning.loading import LoaderPolicy, loader_policy
    from launcher.planning.plan import Plan
    from launcher.planning.planner import make_plan
    from launcher.recipe.all_predictions import all_predictions
    from launcher.recipe.averaging import Averaging, ema, tail
    from launcher.recipe.evaluation_sets import Evaluation
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
    from launcher.recipe.training_log import log
    from launcher.recipe.unplanned_schedules import plateau, torch_schedule
    from launcher.runs.callback_context import CallbackContext
    from launcher.runs.evaluation_result import EvaluationResult
    from launcher.runs.failure_record import Failure, RunFailedError
    from launcher.runs.history import History
    from launcher.runs.run_result import RunResult
    from launcher.runs.rundir import RunDir
    from launcher.sweeps.sweep_result import SweepResult, TrialResult

__all__ = [
    "Averaging",
    "CallbackContext",
    "Data",
    "Evaluation",
    "EvaluationResult",
    "Failure",
    "History",
    "ImageFolder",
    "LMDBSamples",
    "LauncherError",
    "LitShards",
    "LoaderPolicy",
    "Machine",
    "Mixture",
    "MosaicShards",
    "Objective",
    "OptimizerSpec",
    "OverrideError",
    "Packed",
    "ParquetRows",
    "Plan",
    "PlanError",
    "Predictions",
    "Recipe",
    "RecipeError",
    "RemoteCache",
    "RunDir",
    "RunDirError",
    "RunFailedError",
    "RunResult",
    "SQLiteRows",
    "SampleError",
    "Schedule",
    "ScheduleValue",
    "Shards",
    "Source",
    "Stream",
    "SweepResult",
    "TokenFiles",
    "TrainingError",
    "TrialResult",
    "UsageError",
    "WorldError",
    "adamw",
    "all_predictions",
    "attention_mask",
    "constant",
    "cosine",
    "cumulative_lengths",
    "cyclical",
    "ema",
    "evaluate",
    "exponential",
    "four_bits",
    "linear",
    "loader_policy",
    "log",
    "main",
    "make_plan",
    "multi_step",
    "muon",
    "objective",
    "one_cycle",
    "packaged_file",
    "plan",
    "plateau",
    "predict",
    "read_machine",
    "resume",
    "run",
    "schedule",
    "schedule_free",
    "sgd",
    "sweep",
    "tail",
    "torch_schedule",
    "warmup",
    "weighted",
    "wsd",
]

_MODULES = {
    "Averaging": "launcher.recipe.averaging",
    "CallbackContext": "launcher.runs.callback_context",
    "Data": "launcher.recipe.recipe",
    "Evaluation": "launcher.recipe.evaluation_sets",
    "EvaluationResult": "launcher.runs.evaluation_result",
    "Failure": "launcher.runs.failure_record",
    "History": "launcher.runs.history",
    "ImageFolder": "launcher.engine.data.stores.image_folder",
    "LMDBSamples": "launcher.engine.data.stores.lmdb",
    "LauncherError": "launcher.errors",
    "LitShards": "launcher.engine.data.stores.lit",
    "LoaderPolicy": "launcher.planning.loading",
    "Machine": "launcher.environment.machine",
    "Mixture": "launcher.engine.data.mixture",
    "MosaicShards": "launcher.engine.data.stores.mosaic",
    "Objective": "launcher.recipe.objective",
    "OptimizerSpec": "launcher.recipe.optimizer",
    "OverrideError": "launcher.errors",
    "Packed": "launcher.engine.data.packed",
    "ParquetRows": "launcher.engine.data.stores.parquet",
    "Plan": "launcher.planning.plan",
    "PlanError": "launcher.errors",
    "Predictions": "launcher.launch.predict_run",
    "Recipe": "launcher.recipe.recipe",
    "RecipeError": "launcher.errors",
    "RemoteCache": "launcher.engine.data.remote",
    "RunDir": "launcher.runs.rundir",
    "RunDirError": "launcher.errors",
    "RunFailedError": "launcher.runs.failure_record",
    "RunResult": "launcher.runs.run_result",
    "SQLiteRows": "launcher.engine.data.stores.sqlite",
    "SampleError": "launcher.errors",
    "Schedule": "launcher.recipe.schedules",
    "ScheduleValue": "launcher.recipe.schedules",
    "Shards": "launcher.engine.data.shards",
    "Source": "launcher.engine.data.mixture",
    "Stream": "launcher.engine.data.streams",
    "SweepResult": "launcher.sweeps.sweep_result",
    "TokenFiles": "launcher.engine.data.stores.tokens",
    "TrainingError": "launcher.errors",
    "TrialResult": "launcher.sweeps.sweep_result",
    "UsageError": "launcher.errors",
    "WorldError": "launcher.errors",
    "adamw": "launcher.recipe.optimizer",
    "all_predictions": "launcher.recipe.all_predictions",
    "attention_mask": "launcher.engine.data.packed",
    "constant": "launcher.recipe.schedules",
    "cosine": "launcher.recipe.schedules",
    "cumulative_lengths": "launcher.engine.data.packed",
    "cyclical": "launcher.recipe.schedules",
    "ema": "launcher.recipe.averaging",
    "evaluate": "launcher.api",
    "exponential": "launcher.recipe.schedules",
    "four_bits": "launcher.engine.model.four_bits",
    "linear": "launcher.recipe.schedules",
    "loader_policy": "launcher.planning.loading",
    "log": "launcher.recipe.training_log",
    "main": "launcher.entry",
    "make_plan": "launcher.planning.planner",
    "multi_step": "launcher.recipe.schedules",
    "muon": "launcher.recipe.optimizer",
    "objective": "launcher.api",
    "one_cycle": "launcher.recipe.schedules",
    "packaged_file": "launcher.recipe.package_data",
    "plan": "launcher.api",
    "plateau": "launcher.recipe.unplanned_schedules",
    "predict": "launcher.api",
    "read_machine": "launcher.environment.machine",
    "resume": "launcher.api",
    "run": "launcher.api",
    "schedule": "launcher.recipe.schedules",
    "schedule_free": "launcher.recipe.optimizer",
    "sgd": "launcher.recipe.optimizer",
    "sweep": "launcher.api",
    "tail": "launcher.recipe.averaging",
    "torch_schedule": "launcher.recipe.unplanned_schedules",
    "warmup": "launcher.recipe.schedules",
    "weighted": "launcher.engine.data.weighted",
    "wsd": "launcher.recipe.schedules",
}
"""The module that defines each public name."""


def __getattr__(name: str) -> object:
    if name not in _MODULES:
        raise AttributeError(
            f"module 'launcher' has no attribute {name!r}", name=name, obj=sys.modules[__name__]
        )
    value = getattr(importlib.import_module(_MODULES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
