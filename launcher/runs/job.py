"""What a process needs to know to be one rank of a run, as one value that can be sent to it."""

from __future__ import annotations

import platform
import signal
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from launcher.environment.machine import Machine
from launcher.errors import LauncherError, PlanError, RecipeError
from launcher.forking import reason_not_to_fork, without_main_module
from launcher.planning.plan import Plan
from launcher.planning.planner import make_plan
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import Reference, cannot, resolve
from launcher.runs.provenance import command_line, git_state, versions
from launcher.runs.run_record import RunRecord
from launcher.runs.rundir import RunDir

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkContext, SpawnContext


OutputMode = Literal["progress", "json", "nothing"]
"""What a run prints as it goes on."""


MISSING_STATE = "missing-state"
"""What is accepted of a checkpoint that lacks state of the optimizer or of modules."""


ReportWriter = Callable[[RunDir], Path]
"""Writes the HTML page of a run; returns its file. It is importable, to be sent to ranks."""


@dataclass(frozen=True, kw_only=True)
class ResumeFrom:
    """From which checkpoint a run goes on."""

    step: int | None = None
    """The step it was saved after; None takes the newest."""

    fall_back: bool = False
    """Whether an earlier one is taken where it is damaged."""

    accept: tuple[str, ...] = ()
    """What the user accepts of the checkpoint on purpose: `data`, `missing-state`."""


@dataclass(frozen=True, kw_only=True)
class RecipeSource:
    """What another process builds a recipe from; it can be sent there."""

    recipe: str
    """Location of the recipe function."""

    overrides: tuple[Override, ...] = ()

    def build(self) -> Recipe:
        """Return the recipe with its overrides.

        Raises:
            LauncherError: It cannot be imported or built.
        """
        return build(resolve(self.recipe), self.overrides).recipe


@dataclass(frozen=True, kw_only=True)
class Job:
    """A run as it is handed to its ranks."""

    recipe: str
    """Location of the recipe function."""

    overrides: tuple[Override, ...]
    plan: Plan
    run_dir: RunDir
    launcher_pid: int
    """The process that the ranks end with."""

    last_step: int | None = None
    """Steps to take; None takes all that are planned."""

    saves: bool = True
    """Whether its ranks save when they are asked to stop; otherwise they are ended at once."""

    output_mode: OutputMode = "progress"
    """What the ranks print besides their logs."""

    start: ResumeFrom | None = None
    """Where to begin; None begins at the beginning."""

    restarts: int = 0
    """How often a failed run begins again from its newest checkpoint."""

    memory_bytes: int | None = None
    """The most that each rank may use, of its GPU's memory or of the host's; None is all."""

    trial: bool = True
    """Whether a few samples are looked at first, and a run that would be wrong is refused."""

    seconds: float | None = None
    """For how long a probe measures; None where it counts steps."""

    meeting_place: Path | None = None
    """A folder of this machine in which its ranks find each other, while they run."""

    write_report: ReportWriter | None = None
    """Writes the page of the finished run, which rank 0 sends to experiment trackers."""

    @property
    def source(self) -> RecipeSource:
        """What its recipe is built from."""
        return RecipeSource(recipe=self.recipe, overrides=self.overrides)


def plan_recipe(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    nodes: int = 1,
    nproc_per_node: int | None = None,
    elsewhere: bool = False,
    count: Callable[[Callable[[], int]], int] = lambda counting: counting(),
) -> tuple[BuiltRecipe, Plan]:
    """Build a recipe with its overrides, and plan it.

    With `elsewhere`, the plan is for nodes that may have more GPUs than this machine.
    Where the recipe counts epochs and does not say how many samples it has, its data is read to
    count them, which imports whatever reading takes. `count` is given what does that, and returns
    what it returns: several ranks have one of them do it.
    """
    built = build(reference, overrides)
    notes: list[str] = []
    if elsewhere:
        machine, notes = _assume(built.recipe, machine, nproc_per_node)
    samples = None
    if built.recipe.epochs is not None and built.recipe.train_samples is None:
        samples = count(lambda: _count_samples(reference, overrides, built))
    plan = make_plan(
        built.recipe,
        machine,
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        train_samples=samples,
        sources=built.sources,
    )
    if samples is not None:
        notes.append(
            f"The data was read to count its {samples:,} training samples; train_samples={samples} "
            "in the recipe spares that."
        )
    return built, replace(plan, notes=(*plan.notes, *notes))


def describe_run(reference: Reference, built: BuiltRecipe, plan: Plan) -> RunRecord:
    """Return the record of a run that this process starts."""
    file = Path(reference.location.rpartition(":")[0])
    folder = file.parent if file.is_absolute() else Path.cwd()
    return RunRecord(
        recipe=reference.location,
        overrides=dict(built.overrides),
        plan=plan.to_dict(),
        versions=versions(),
        git=git_state(folder),
        host=platform.node(),
        folder=str(Path.cwd()),
        command=tuple(command_line()),
    )


def _assume(recipe: Recipe, machine: Machine, nproc: int | None) -> tuple[Machine, list[str]]:
    """Return `machine` with as many GPUs as a plan for elsewhere needs, and what to say of it."""
    if recipe.device == "cpu":
        return machine, []
    if recipe.device is None and not machine.num_gpus:
        return machine, ["This machine has no GPU; device=cuda plans for machines that have."]
    if nproc is None or nproc <= machine.num_gpus:
        return machine, []
    note = f"Planned for {nproc} GPUs per node; this machine has {machine.num_gpus}."
    return replace(machine, num_gpus=nproc), [note]


def _count_samples(reference: Reference, overrides: Sequence[Override], built: BuiltRecipe) -> int:
    """Return the training samples of a recipe, counted in a process of its own.

    Reading data may start threads, of OpenMP for one, and no rank could be forked from a process
    that has had them. Where the recipe's import has started some already, that process imports the
    recipe itself.

    Raises:
        LauncherError: The data cannot be read, or has no length.
    """
    import multiprocessing

    context: SpawnContext | ForkContext = multiprocessing.get_context("fork")
    target: Callable[..., None] = _count_for
    arguments: tuple[Any, ...] = (built,)
    if reason_not_to_fork() is not None:
        context = multiprocessing.get_context("spawn")
        target, arguments = _count_afresh, (reference.location, tuple(overrides))
    receiver, sender = context.Pipe(duplex=False)
    counting = context.Process(target=target, args=(*arguments, sender))
    with without_main_module():
        counting.start()
    sender.close()
    try:
        found: int | LauncherError = receiver.recv()
    except EOFError:
        counting.join()
        found = RecipeError(
            f"{built.recipe.name}: reading the data to count its samples ended the process (exit "
            f"code {counting.exitcode}). train_samples=... in the recipe spares that."
        )
    counting.join()
    if isinstance(found, LauncherError):
        raise found
    return found


def _count_afresh(location: str, overrides: tuple[Override, ...], sender: Connection) -> None:
    try:
        built = build(resolve(location), overrides)
    except LauncherError as error:
        sender.send(error)
        return
    _count_for(built, sender)


def _count_for(built: BuiltRecipe, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the one who asks has words for it
    try:
        sender.send(_length_of(built))
    except LauncherError as error:
        sender.send(error)


def _length_of(built: BuiltRecipe) -> int:
    try:
        data = built.recipe.data()
    except LauncherError:
        raise
    except Exception as error:
        raise cannot("read the data of", built.recipe.name, error) from error
    try:
        return len(data.train)
    except (AttributeError, TypeError):
        raise PlanError(
            f"{built.recipe.name}: epochs={built.recipe.epochs} needs the number of training "
            f"samples, and the data function returned {type(data).__name__} without a length in "
            "`train`. Return launcher.Data(train=...), or give steps instead of epochs."
        ) from None
