"""What runs and finders have measured of a recipe on one device, read from their folders."""

from __future__ import annotations

import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

from launcher.analysis.gradient_noise import Measurement, estimate
from launcher.errors import RunDirError
from launcher.planning.plan import Plan
from launcher.runs.run_record import read_run
from launcher.runs.rundir import RunDir, open_run_dir

_WARM_UP = 0.1
"""The part of a run's steps that is left out: what is first used is slow."""

_STALL = "checkpoint_stall_seconds"


@dataclass(frozen=True, kw_only=True)
class Measurements:
    """A recipe on one device."""

    micro_steps: tuple[tuple[int, float], ...]
    """(samples, seconds) of each size of micro-batch that was timed."""

    num_trained: int
    """Weights that are trained."""

    data_wait: float
    """The part of the time in which steps waited for data."""

    noise_scale: float | None = None
    """B_simple in samples, where it was measured."""

    save_seconds: float | None = None
    """What a checkpoint holds up the training for, where one was saved."""


def read_measured(folders: Sequence[Path], plan: Plan) -> Measurements:
    """Read folders of `launcher run`, `find batch` and `find noise`, each for what it has.

    Raises:
        RunDirError: Nothing was timed, or on several ranks, or of something else than `plan` is of.
    """
    found = _Found()
    for folder in folders:
        sizes = [RunDir(each.parent) for each in sorted(folder.glob("size-*/size.json"))]
        for run_dir in sizes or [open_run_dir(folder)]:
            said = _plan_of(run_dir, plan)
            if run_dir.noise.is_file():
                found.read_noise(run_dir, said)
                continue
            if said["world_size"] != 1:
                raise RunDirError(
                    f"{folder} was measured on {said['world_size']} ranks, and their steps have "
                    "communication in them. Measure on one: `-n 1`."
                )
            if run_dir.size.is_file():
                found.read_size(run_dir, said)
            else:
                found.read_steps(run_dir, said)
    if not found.micro_steps:
        raise RunDirError(
            f"{', '.join(map(str, folders))}: no step was timed there. Give the folder of "
            "`launcher run RECIPE -n 1`, or of `launcher find batch RECIPE -n 1`."
        )
    return Measurements(
        micro_steps=tuple(sorted(found.micro_steps.items())),
        num_trained=found.num_trained,
        data_wait=found.data_wait,
        noise_scale=found.noise_scale,
        save_seconds=found.save_seconds,
    )


class _Found:
    """What the folders have so far."""

    def __init__(self) -> None:
        self.micro_steps: dict[int, float] = {}
        self.num_trained = 0
        self.data_wait = 0.0
        self.noise_scale: float | None = None
        self.save_seconds: float | None = None

    def read_noise(self, run_dir: RunDir, said: dict[str, Any]) -> None:
        """Take the noise scale, from items to samples, of the second half of the steps."""
        values = _read(run_dir.noise)["measurements"]
        measured = [Measurement(**each) for each in values]
        scale = estimate(measured[len(measured) // 2 :]) or estimate(measured)
        if scale is not None:
            items = fmean(each.big_items for each in measured)
            self.noise_scale = scale.b_simple * said["batch_size"] / items

    def read_size(self, run_dir: RunDir, said: dict[str, Any]) -> None:
        """Take the speed of a size that fits."""
        values = _read(run_dir.size)
        self.num_trained = _num_trained(values, run_dir)
        size = said["micro_batch_size"]
        self.micro_steps[size] = size / values["samples_per_second"]

    def read_steps(self, run_dir: RunDir, said: dict[str, Any]) -> None:
        """Take the speed of a run's steps, and what its checkpoints took."""
        if not run_dir.result.is_file():
            raise RunDirError(f"{run_dir.shown} has no result yet: the run has not finished.")
        self.num_trained = _num_trained(_read(run_dir.result), run_dir)
        lines = run_dir.metrics.read_text(encoding="utf-8").splitlines()
        rows = [json.loads(line) for line in lines]
        stalls = [row[_STALL] for row in rows if _STALL in row]
        if stalls:
            self.save_seconds = median(stalls)
        steps = [row for row in rows if "loss" in row]
        samples = [row["samples"] - before["samples"] for before, row in itertools.pairwise(steps)]
        first = int(len(samples) * _WARM_UP)
        timed = list(zip(steps[1:], samples, strict=True))[first:]
        seconds = sum(taken / row["samples_per_second"] for row, taken in timed)
        if not timed or not seconds:
            raise RunDirError(f"{run_dir.shown} took one step alone: too few to time.")
        size = said["micro_batch_size"]
        self.micro_steps[size] = size * seconds / sum(samples[first:])
        self.data_wait = sum(row["data_wait_seconds"] for row, _ in timed) / seconds


def _plan_of(run_dir: RunDir, plan: Plan) -> dict[str, Any]:
    """Return the plan of a folder, which has to be of the same recipe on the same device."""
    said = dict(read_run(run_dir).plan)
    for name in ("recipe", "device", "precision"):
        if said[name] != getattr(plan, name):
            raise RunDirError(
                f"{run_dir.shown} was measured with {name}={said[name]}, and the plan is for "
                f"{name}={getattr(plan, name)}. Measure what is planned, or plan what was measured."
            )
    return said


def _num_trained(values: dict[str, Any], run_dir: RunDir) -> int:
    if "num_trained" not in values:
        raise RunDirError(
            f"{run_dir.shown} does not say how many weights were trained: an earlier version of "
            "launcher measured it. Measure again."
        )
    return int(values["num_trained"])


def _read(path: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RunDirError(f"Cannot read {path}: {error}.") from None
    return values
