"""Build a recipe with its overrides, plan it, and describe the run for run.yaml."""

from __future__ import annotations

import functools
import platform
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher.environment.machine import Machine
from launcher.errors import LauncherError, PlanError, RecipeError
from launcher.forking import reason_not_to_fork, without_main_module
from launcher.planning.plan import Plan
from launcher.planning.planner import make_plan
from launcher.recipe.overrides import BuiltRecipe, Override, build
from launcher.recipe.project_code import digests_of, project_of
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import Reference, resolve, user_code_error
from launcher.runs.freezing import read_frozen
from launcher.runs.provenance import GitState, command_line, git_state, versions
from launcher.runs.run_record import CodeRecord, RunRecord

if TYPE_CHECKING:
    from multiprocessing.connection import Connection
    from multiprocessing.context import ForkContext, SpawnContext


def plan_recipe(
    reference: Reference,
    overrides: Sequence[Override],
    machine: Machine,
    *,
    nodes: int = 1,
    nproc_per_node: int | None = None,
    elsewhere: bool = False,
    in_process: bool = False,
    count: Callable[[Callable[[], int]], int] = lambda counting: counting(),
) -> tuple[BuiltRecipe, Plan]:
    """Build a recipe with its overrides, and plan it.

    If the recipe counts epochs and does not state its number of training samples, its data is read
    to count them.

    Args:
        reference: The recipe.
        overrides: Values that replace the recipe's own.
        machine: The machine that every node is taken to be.
        nodes: Number of nodes.
        nproc_per_node: Ranks per node; None chooses one per GPU.
        elsewhere: Whether the nodes may have more GPUs than `machine`.
        in_process: Whether samples are counted in this process, and not in a child process.
        count: Calls the function that counts the samples and returns its result; several ranks
            have one of them count.

    Raises:
        LauncherError: The recipe cannot be built or planned, or its samples cannot be counted.
    """
    built = build(reference, overrides)
    notes: list[str] = []
    if elsewhere:
        machine, notes = _assume_gpus(built.recipe, machine, nproc_per_node)
    samples = None
    if built.recipe.epochs is not None and built.recipe.train_samples is None:
        counted_here = functools.partial(_count_training_samples, built)
        counted_apart = functools.partial(_count_samples, reference, overrides, built)
        samples = count(counted_here if in_process else counted_apart)
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
            "in the recipe avoids that."
        )
    return built, replace(plan, notes=(*plan.notes, *notes))


def describe_run(reference: Reference, built: BuiltRecipe, plan: Plan) -> RunRecord:
    """Return the record of a run that this process starts."""
    return RunRecord(
        recipe=reference.recorded,
        overrides=dict(built.overrides),
        plan=plan.to_dict(),
        versions=versions(),
        code=describe_code(reference),
        git=_git_state(reference),
        host=platform.node(),
        folder=str(Path.cwd()),
        command=tuple(command_line()),
    )


def describe_code(reference: Reference) -> CodeRecord | None:
    """Return the record of a recipe's code as it is now; None if it belongs to no project."""
    project = project_of(reference)
    if project is None:
        return None
    code, files = reference.code, digests_of(project)
    if code is None:
        return CodeRecord(project=str(project.folder), files=files)
    return CodeRecord(project=str(code.project), files=files, copy=str(code.copy))


def _git_state(reference: Reference) -> GitState | None:
    """Return the state of the repository around a recipe, or of the one that was copied."""
    if reference.code is not None:
        return read_frozen(reference.code.copy).git
    file = Path(reference.recorded.rpartition(":")[0])
    return git_state(file.parent if file.is_absolute() else Path.cwd())


def _assume_gpus(
    recipe: Recipe, machine: Machine, nproc_per_node: int | None
) -> tuple[Machine, list[str]]:
    """Return `machine` with the GPUs that a plan for other nodes needs, and notes about it."""
    if recipe.device == "cpu":
        return machine, []
    if recipe.device is None and not machine.num_gpus:
        return machine, ["This machine has no GPU; device=cuda plans for machines with GPUs."]
    if nproc_per_node is None or nproc_per_node <= machine.num_gpus:
        return machine, []
    note = f"Planned for {nproc_per_node} GPUs per node; this machine has {machine.num_gpus}."
    return replace(machine, num_gpus=nproc_per_node), [note]


def _count_samples(reference: Reference, overrides: Sequence[Override], built: BuiltRecipe) -> int:
    """Count the training samples of a recipe in a child process.

    Reading data may start threads, such as those of OpenMP, after which no rank could be forked
    from this process. If the import of the recipe has already started some, the child is spawned
    and imports the recipe itself.

    Raises:
        LauncherError: The data cannot be read, or has no length.
    """
    import multiprocessing

    context: SpawnContext | ForkContext = multiprocessing.get_context("fork")
    target: Callable[..., None] = _send_count
    arguments: tuple[Any, ...] = (built,)
    if reason_not_to_fork() is not None:
        context = multiprocessing.get_context("spawn")
        target, arguments = _build_and_send_count, (reference.location, tuple(overrides))
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=target, args=(*arguments, sender))
    with without_main_module():
        child.start()
    sender.close()
    try:
        answer: int | LauncherError = receiver.recv()
    except EOFError:
        child.join()
        code = child.exitcode or 0
        how = f"exit code {code}" if code >= 0 else f"the signal {signal.Signals(-code).name}"
        answer = RecipeError(
            f"{built.recipe.name}: the process that read the data to count its samples ended with "
            f"{how}. The recipe's data function, or a library that it calls, has ended it."
        )
    child.join()
    if isinstance(answer, LauncherError):
        raise answer
    return answer


def _build_and_send_count(
    location: str, overrides: tuple[Override, ...], sender: Connection
) -> None:
    try:
        built = build(resolve(location), overrides)
    except LauncherError as error:
        sender.send(error)
        return
    _send_count(built, sender)


def _send_count(built: BuiltRecipe, sender: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # the parent reports Ctrl-C
    try:
        sender.send(_count_training_samples(built))
    except LauncherError as error:
        sender.send(error)


def _count_training_samples(built: BuiltRecipe) -> int:
    try:
        data = built.recipe.data()
    except (LauncherError, KeyboardInterrupt):
        raise
    except BaseException as error:
        raise user_code_error("read the data of", built.recipe.name, error) from error
    try:
        return len(data.train)
    except (AttributeError, TypeError):
        raise PlanError(
            f"{built.recipe.name}: epochs={built.recipe.epochs} needs the number of training "
            f"samples, and the data function returned {type(data).__name__} with no `train` that "
            "has a length. Return launcher.Data(train=...). For a stream, give steps instead of "
            "epochs, or state train_samples, the samples that an epoch takes from it."
        ) from None
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise user_code_error("count the samples of", built.recipe.name, error) from error
