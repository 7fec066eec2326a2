"""The files in which ranks leave what they measured, read back as typed values."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from launcher.analysis.gradient_noise import Measurement
from launcher.analysis.lr_curve import LossCurve
from launcher.analysis.lr_trials import LRSearchResult, LRTrial
from launcher.analysis.step_profile import Profile
from launcher.errors import RunDirError
from launcher.json_file import Count, read_json
from launcher.runs.rundir import RunDir

_Positive = Annotated[float, Meta(gt=0)]
_Seconds = Annotated[float, Meta(ge=0)]

_REMEDY = "Measure again."


@dataclass(frozen=True, kw_only=True)
class SizeReading:
    """size.json: what was measured with one micro-batch size."""

    samples_per_second: _Positive
    """Throughput of all ranks together."""

    peak_bytes: Count | None = None
    """Peak memory of the rank that uses most."""

    start_peak_bytes: Count | None = None
    """The same until the end of the first step; None if an earlier version measured it."""

    num_trained: Count | None = None
    """Number of trained weights; None if an earlier version measured it."""


@dataclass(frozen=True, kw_only=True)
class LoaderReading:
    """reading.json: means over the ranks of what was measured with one number of workers."""

    samples_per_second: _Positive
    """Throughput of all ranks together."""

    wait_seconds_per_step: _Seconds = 0.0
    """Seconds per step that a rank waits for data."""

    step_seconds: _Seconds = 0.0
    """Seconds per step."""

    reading_seconds: _Seconds = 0.0
    """Wall time to read one sample."""

    reading_cpu_seconds: _Seconds = 0.0
    """CPU time of that."""

    computing_seconds: _Seconds = 0.0
    """Wall time to compute on one sample."""

    computing_cpu_seconds: _Seconds = 0.0
    """CPU time of that."""

    slowest_batch_seconds: _Seconds = 0.0
    """Time of the slowest batch."""

    batch_bytes: _Seconds = 0.0
    """Size of a batch."""

    worker_bytes: _Seconds = 0.0
    """Private memory of a worker at the end of the measurement; 0 without workers."""

    worker_proportional_bytes: _Seconds = 0.0
    """That, and a worker's part of the memory that it shares."""

    start_seconds: _Seconds = 0.0
    """Seconds until the first batch, which include building the model."""

    reason_against_threads: str | None = None
    """Why several threads of a process do not help to read the samples; None if they may, or if
    it was not tested."""


@dataclass(frozen=True, kw_only=True)
class NoiseReading:
    """noise.json: the measurement of each step."""

    measurements: tuple[Measurement, ...]

    momentum: Annotated[float, Meta(ge=0, lt=1)] = 0.0
    """Momentum of the optimizer, or the first beta of Adam: the mean over the steps."""


@dataclass(frozen=True, kw_only=True)
class _Profiles:
    """profile.json: the profile of each rank."""

    ranks: list[Profile]


@dataclass(frozen=True, kw_only=True)
class _Trials:
    """trials.json: the outcome at each learning rate."""

    trials: tuple[LRTrial, ...]


def read_trials(run_dir: RunDir) -> tuple[LRTrial, ...]:
    """Return the outcomes of short trainings in a run folder, in their order.

    Raises:
        RunDirError: They are missing or damaged.
    """
    return read_json(run_dir.trials, _Trials, remedy=_REMEDY).trials


def read_curve(run_dir: RunDir) -> LossCurve:
    """Return the loss curve in a run folder.

    Raises:
        RunDirError: It is missing or damaged.
    """
    curve: LossCurve = read_json(run_dir.curve, LossCurve, remedy=_REMEDY)
    if len(curve.lrs) != len(curve.losses):
        raise RunDirError(
            f"{run_dir.curve} is damaged: it has {len(curve.lrs)} learning rates and "
            f"{len(curve.losses)} losses. {_REMEDY}"
        )
    return curve


def read_lr_search(run_dir: RunDir) -> LRSearchResult:
    """Return what a search for a learning rate found.

    Raises:
        RunDirError: It is missing or damaged.
    """
    return read_json(run_dir.lr_search, LRSearchResult, remedy=_REMEDY, exact=True)


def read_noise(run_dir: RunDir) -> NoiseReading:
    """Return the measurements of gradient noise in a run folder.

    Raises:
        RunDirError: They are missing or damaged.
    """
    reading = read_json(run_dir.noise, NoiseReading, remedy=_REMEDY)
    for measurement in reading.measurements:
        if measurement.big_items <= 0 or measurement.small_inverse * measurement.big_items <= 1:
            raise RunDirError(
                f"{run_dir.noise} is damaged: the parts of step {measurement.step} are not smaller "
                f"than its batch. {_REMEDY}"
            )
    return reading


def read_size(run_dir: RunDir) -> SizeReading:
    """Return what was measured with one micro-batch size.

    Raises:
        RunDirError: It is missing or damaged.
    """
    return read_json(run_dir.size, SizeReading, remedy=_REMEDY)


def read_loading(run_dir: RunDir) -> LoaderReading:
    """Return what was measured with one number of workers.

    Raises:
        RunDirError: It is missing or damaged.
    """
    return read_json(run_dir.reading, LoaderReading, remedy=_REMEDY)


def read_profiles(run_dir: RunDir) -> list[Profile]:
    """Return the profile of each rank.

    Raises:
        RunDirError: They are missing or damaged.
    """
    return read_json(run_dir.profile, _Profiles, remedy=_REMEDY).ranks
