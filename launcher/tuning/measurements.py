"""Measurements of a recipe on one device, read from the folders of runs and searches."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from launcher.analysis.gradient_noise import critical_batch, estimate_noise_scale
from launcher.errors import RunDirError
from launcher.paths import is_file
from launcher.planning.plan import Plan
from launcher.runs.final_result import read_result
from launcher.runs.history import History
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir, open_run_dir
from launcher.tuning.measured_files import read_noise, read_size

_WARM_UP_FRACTION = 0.1
"""Fraction of a run's steps that is ignored, because the first steps are slow."""


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """Everything that was measured of a recipe on one device."""

    micro_steps: tuple[tuple[int, float], ...]
    """(samples, seconds) of each timed micro-batch size, in ascending order."""

    num_trained: int
    """Number of trained weights."""

    data_wait: float
    """Fraction of the time of the steps that they waited for data."""

    critical_batch: float | None = None
    """B_crit in samples, from the noise scale; None if it was not measured."""

    save_seconds: float | None = None
    """Time that a checkpoint stalls the training; None if no checkpoint was saved."""


def read_measurements(folders: Sequence[Path], plan: Plan) -> Measurements:
    """Read the measurements in folders of `launcher run`, `find batch` and `find noise`.

    Args:
        folders: Folders, each of which may contribute any of the measurements.
        plan: The plan that the measurements are for.

    Raises:
        RunDirError: No step was timed, or it was on several ranks, or a folder is unfinished or
            belongs to another recipe, device or precision than the plan.
    """
    reader = _MeasurementReader()
    for folder in folders:
        trial_dirs = [RunDir(file.parent) for file in sorted(folder.glob("size-*/size.json"))]
        for run_dir in trial_dirs or [open_run_dir(folder)]:
            measured_plan = _read_plan(run_dir, plan)
            if is_file(run_dir.noise):
                reader.read_noise(run_dir, measured_plan)
                continue
            if measured_plan["world_size"] != 1:
                raise RunDirError(
                    f"{folder} was measured on {measured_plan['world_size']} ranks, whose steps "
                    "include communication. An estimate needs steps of one rank: measure again "
                    "with `-n 1`."
                )
            if is_file(run_dir.size):
                reader.read_size(run_dir, measured_plan)
            else:
                reader.read_steps(run_dir, measured_plan)
    if not reader.micro_steps:
        raise RunDirError(
            f"No timed steps in {', '.join(map(str, folders))}. Give the folder of "
            "`launcher run RECIPE -n 1` or of `launcher find batch RECIPE -n 1`."
        )
    return Measurements(
        micro_steps=tuple(sorted(reader.micro_steps.items())),
        num_trained=reader.num_trained,
        data_wait=reader.data_wait,
        critical_batch=reader.critical_batch,
        save_seconds=reader.save_seconds,
    )


class _MeasurementReader:
    """The measurements read from the folders so far."""

    def __init__(self) -> None:
        self.micro_steps: dict[int, float] = {}
        self.num_trained = 0
        self.data_wait = 0.0
        self.critical_batch: float | None = None
        self.save_seconds: float | None = None

    def read_noise(self, run_dir: RunDir, measured_plan: dict[str, Any]) -> None:
        """Read B_crit over the second half of the steps, converted from items to samples."""
        reading = read_noise(run_dir)
        measurements = reading.measurements
        second_half = measurements[len(measurements) // 2 :]
        scale = estimate_noise_scale(second_half) or estimate_noise_scale(measurements)
        if scale is not None:
            items = fmean(measurement.big_items for measurement in measurements)
            samples_per_item = measured_plan["batch_size"] / items
            critical = critical_batch(scale.b_simple, reading.momentum)
            self.critical_batch = critical * samples_per_item

    def read_size(self, run_dir: RunDir, measured_plan: dict[str, Any]) -> None:
        """Read the speed of a trial of a micro-batch size."""
        reading = read_size(run_dir)
        self.num_trained = _num_trained(reading.num_trained, run_dir)
        micro_batch_size = measured_plan["micro_batch_size"]
        self.micro_steps[micro_batch_size] = micro_batch_size / reading.samples_per_second

    def read_steps(self, run_dir: RunDir, measured_plan: dict[str, Any]) -> None:
        """Read the speed of a run's steps and the stalls of its checkpoints."""
        result = read_result(run_dir)
        if result is None:
            raise RunDirError(
                f"{run_dir.shown} has no result.json: the run has not finished. Resume it or "
                "measure again."
            )
        self.num_trained = _num_trained(result.num_trained, run_dir)
        history = History(run_dir)
        if history.stalls:
            self.save_seconds = median(seconds for _, seconds in history.stalls)
        steps = history.steps
        num_samples = [after - before for before, after in itertools.pairwise(steps["samples"])]
        first = int(len(num_samples) * _WARM_UP_FRACTION)
        timed = list(
            zip(
                num_samples,
                steps["samples_per_second"][1:],
                steps["data_wait_seconds"][1:],
                strict=True,
            )
        )[first:]
        seconds = sum(samples / throughput for samples, throughput, _ in timed if throughput)
        total_samples = sum(num_samples[first:])
        if not (seconds > 0 and total_samples > 0):
            raise RunDirError(
                f"{run_dir.shown} took only one step, which is too few to time. Train at least 2 "
                "steps."
            )
        micro_batch_size = measured_plan["micro_batch_size"]
        self.micro_steps[micro_batch_size] = micro_batch_size * seconds / total_samples
        self.data_wait = sum(waits for _, _, waits in timed) / seconds


def _read_plan(run_dir: RunDir, plan: Plan) -> dict[str, Any]:
    """Return the plan of a folder.

    Raises:
        RunDirError: It is for another recipe, device or precision than `plan`.
    """
    measured_plan = read_run(run_dir).read_plan().to_dict()
    for name in ("recipe", "device", "precision"):
        if measured_plan[name] != getattr(plan, name):
            raise RunDirError(
                f"{run_dir.shown} was measured with {name}={measured_plan[name]}, but the plan has "
                f"{name}={getattr(plan, name)}. Measure again with the settings of the plan, or "
                "plan with the settings that were measured."
            )
    return measured_plan


def _num_trained(num_trained: int | None, run_dir: RunDir) -> int:
    if num_trained is None:
        raise RunDirError(
            f"{run_dir.shown} does not record num_trained, the number of trained weights: an "
            "earlier version of launcher measured it. Measure again."
        )
    return num_trained
