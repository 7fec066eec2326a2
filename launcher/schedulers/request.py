"""A request to submit a run, or an array of runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.errors import UsageError
from launcher.recipe.grid import combinations_of, count_combinations, read_axes
from launcher.recipe.resolve import Reference

_MAX_RUNS = 10_000
"""Runs of the largest array; Slurm itself has a limit of 1,001 unless a site raises it."""


@dataclass(frozen=True, kw_only=True)
class Restarting:
    """How a run restarts within its job."""

    max_restarts: int = 0
    """How often; 0 leaves restarts to the scheduler."""

    spares: int = 0
    """Further nodes of the job, which take the place of lost ones."""

    node_timeout: float | None = None
    """Seconds without a sign of a node after which it is lost; None is the default."""


@dataclass(frozen=True, kw_only=True)
class Queueing:
    """What a job asks of Slurm's queue; None is what the site profile says."""

    array_cap: int | None = None
    """The largest number of runs of an array that train at the same time."""

    dependency: str | None = None
    """The jobs that have to end first, as sbatch takes them: afterok:1234."""

    reservation: str | None = None
    """The reservation whose nodes the job uses."""

    mail_type: str | None = None
    """The events that are mailed, as sbatch takes them: END,FAIL."""

    mail_user: str | None = None
    """The address that the mail goes to."""

    @property
    def given(self) -> dict[str, object]:
        """The options that are given, by their names on the command line."""
        values = {f"--{name.replace('_', '-')}": value for name, value in vars(self).items()}
        return {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True, kw_only=True)
class SubmitRequest:
    """A request to submit a run, or an array of runs."""

    reference: Reference
    arguments: tuple[str, ...]
    """name=value arguments of every run."""

    grid: tuple[tuple[str, ...], ...]
    """name=value arguments of each run of an array; empty for a single run."""

    config: Path | None
    nodes: tuple[int, int]
    """The smallest and the largest number of nodes that train."""

    gpus_per_node: int | None
    nproc_per_node: int | None
    time: str | None
    restarting: Restarting = Restarting()
    queueing: Queueing = Queueing()
    freezes: bool = True
    """Whether the job imports a copy of the recipe's project, made when it is submitted."""

    code_limit: int | None = None
    """Megabytes that the copy may have; None is the limit of the site."""

    health: Literal["off", "quick", "full"] | None = None
    """How each node is examined; None is what the site says."""

    mirror: str | None = None
    """URL at which the run is kept as well; None keeps it in its folder alone."""

    is_dry: bool = False
    """Whether the job is only shown. It then imports the project itself, so that it can be
    submitted by hand."""

    @property
    def mirror_words(self) -> list[str]:
        """The option of `launcher run` for the mirror."""
        return [] if self.mirror is None else ["--mirror", self.mirror]

    @property
    def runs(self) -> tuple[tuple[str, ...], ...]:
        """The arguments of each run."""
        return tuple((*self.arguments, *settings) for settings in self.grid or ((),))


def combinations(arguments: Sequence[str]) -> tuple[tuple[str, ...], ...]:
    """Return all combinations of axes such as lr=0.1,0.2 and seed=1,2, as name=value.

    A comma within brackets belongs to a value.

    Raises:
        UsageError: An axis does not have that form, or there are too many combinations.
    """
    axes = read_axes(arguments, option="--array")
    if (count := count_combinations(axes)) > _MAX_RUNS:
        raise UsageError(
            f"--array asks for {count:,} runs, one for each combination of values; an array has at "
            f"most {_MAX_RUNS:,}."
        )
    return tuple(
        tuple(f"{name}={value}" for name, value in pairs) for pairs in combinations_of(axes)
    )
