"""A run as it is handed to its ranks.

A `Job` is one picklable value that holds everything a process needs to be one rank of a run.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from launcher.planning.plan import Plan
from launcher.recipe.overrides import Override, build
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import resolve
from launcher.runs.prediction_files import Prediction
from launcher.runs.rundir import RunDir
from launcher.runs.weight_choice import WeightChoice

OutputMode = Literal["progress", "json", "quiet"]
"""What a run prints: a progress display, one JSON object per line, or only errors."""


MISSING_STATE = "missing-state"
"""Value of `--accept` for a checkpoint that lacks state of the optimizer or of modules."""


ReportWriter = Callable[[RunDir], Path]
"""Writes the HTML page of a run and returns its file.

It is a module-level function, so that it can be sent to ranks."""


@dataclass(frozen=True, kw_only=True)
class ResumeFrom:
    """The checkpoint from which a run resumes."""

    step: int | None = None
    """The step after which it was saved; None takes the newest checkpoint."""

    fall_back: bool = False
    """Whether an earlier checkpoint is taken if this one is damaged."""

    accept: tuple[str, ...] = ()
    """Differences that the user accepts on purpose: `data`, `missing-state`."""

    promotes: bool = True
    """Whether a newer quick checkpoint on the nodes is taken instead; not if the user has named the
    checkpoint."""


@dataclass(frozen=True, kw_only=True)
class RecipeSource:
    """What another process builds a recipe from; it can be pickled."""

    recipe: str
    """Location of the recipe function."""

    overrides: tuple[Override, ...] = ()
    """Values that replace the recipe's own."""

    def build(self) -> Recipe:
        """Return the recipe with its overrides applied.

        Raises:
            LauncherError: The recipe cannot be imported or built.
        """
        return build(resolve(self.recipe), self.overrides).recipe


Cause = Literal["rank", "node", "health", "joined"]
"""Why the launchers of several nodes start the ranks again: a rank has failed, a node is lost or is
not fit, or a node has joined."""


@dataclass(frozen=True, kw_only=True)
class Loss:
    """What has made the launchers of several nodes start the ranks of a run again."""

    node: str
    """Name of the node that was lost, failed or joined."""

    cause: Cause
    exit_code: int | None = None
    """Exit code of its ranks; None if the node was lost."""

    index: int = 0
    """Its index among the nodes of the run."""

    time: float = 0.0
    """When the launcher that decides noticed, in seconds since 1970."""


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as it is handed to its ranks; it can be pickled."""

    recipe: str
    """Location of the recipe function."""

    overrides: tuple[Override, ...]
    """Values that replace the recipe's own."""

    plan: Plan
    """The plan that the ranks carry out."""

    run_dir: RunDir
    """The run folder."""

    launcher_pid: int
    """Process id of the launcher; its ranks end when it does."""

    last_step: int | None = None
    """Step after which the run ends; None takes every planned step."""

    pause_after: int | None = None
    """Step after which the run stops with a checkpoint, as on a signal, for a sweep to choose."""

    saves: bool = True
    """Whether the ranks save a checkpoint when asked to stop; otherwise they are killed at once."""

    output_mode: OutputMode = "progress"
    """What the ranks print besides their logs."""

    started: float | None = None
    """`time.monotonic()` at the start of the command, from which `max_time` counts; None counts
    from the start of training."""

    start: ResumeFrom | None = None
    """The checkpoint to resume from; None starts at step 0."""

    restarts: int = 0
    """How often the agent of this machine restarts its failed ranks from the newest checkpoint."""

    attempt: int = 0
    """How often the ranks have been started before by the launchers of several nodes."""

    restarts_together: bool = False
    """Whether the launchers of several nodes restart the ranks, and not the agent."""

    loss: Loss | None = None
    """Why they did last; None before a restart."""

    memory_bytes: int | None = None
    """Memory limit of each rank, on its GPU or on the host; None sets no limit."""

    trial: bool = True
    """Whether a few samples are tried before the first step, and a faulty recipe is refused."""

    seconds: float | None = None
    """How long a probe measures; None if it takes a number of steps instead."""

    rendezvous_folder: Path | None = None
    """Private folder on this machine for the file rendezvous of its ranks; None with several nodes,
    whose ranks meet at a store."""

    private_folder: Path | None = None
    """Folder on this machine for the temporary files of its ranks, removed when the run ends."""

    folder: Path | None = None
    """The working folder of its ranks; None is that of the process that starts them."""

    weights: WeightChoice | None = None
    """The weights of a run that are evaluated; None for jobs that train."""

    prediction: Prediction | None = None
    """What is predicted with the weights; None for other jobs."""

    write_report: ReportWriter | None = None
    """Writes the page of the finished run, which rank 0 sends to experiment trackers."""

    @property
    def source(self) -> RecipeSource:
        """What the recipe is built from."""
        return RecipeSource(recipe=self.recipe, overrides=self.overrides)
