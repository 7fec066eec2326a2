"""What a recipe's file does when it is run by Python, torchrun, accelerate or deepspeed."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

from launcher.cli import echo_if_possible, run_command
from launcher.cli.arguments import (
    SettingsCommand,
    accept_option,
    config_option,
    out_option,
    overrides_argument,
    read_overrides,
)
from launcher.cli.standard_streams import open_closed_streams
from launcher.cli.start import make_run_dir
from launcher.errors import LostRankError, UsageError
from launcher.forking import suspect_all_threads
from launcher.recipe.recipe import Recipe
from launcher.signals import StopRequest, handlers_restored

_SECONDS_TO_BE_ENDED = 5


def run_standalone(function: Callable[..., Recipe]) -> None:
    """Parse the command line of a recipe's file, train, and end the process on an error.

    Where it returns, signals are handled as they were before.
    """
    open_closed_streams()
    suspect_all_threads()
    with handlers_restored():
        code = run_command(_command(function))
    if code:
        sys.exit(code)


def _command(function: Callable[..., Recipe]) -> click.Command:
    stop = StopRequest()
    stop.listen()  # before torch is imported, which takes seconds

    @click.command(cls=SettingsCommand, help=_help(function))
    @overrides_argument
    @config_option
    @out_option
    @click.option("--local_rank", "--local-rank", hidden=True, expose_value=False)  # deepspeed's
    @click.option(
        "--resume",
        type=click.Path(path_type=Path),
        metavar="RUN_DIR",
        help="Go on with a run from its newest undamaged checkpoint.",
    )
    @accept_option
    def command(
        overrides: tuple[str, ...],
        config: Path | None,
        out: Path | None,
        resume: Path | None,
        accept: tuple[str, ...],
    ) -> int:
        if accept and resume is None:
            raise UsageError(
                f"--accept {accept[0]} is about a run that goes on: give --resume as well."
            )
        if out is not None and resume is not None:
            raise UsageError(
                f"--out {out} makes a run folder and --resume {resume} goes on in one: keep one."
            )
        try:
            return _train(function, overrides, config, out, resume, accept, stop)
        except (UsageError, LostRankError):
            # Most mistakes are found by every rank of a node. The first of them says so and ends,
            # and then the launcher ends the others; one that lives on was alone in finding it.
            if os.environ.get("LOCAL_RANK", "0") != "0":
                stop.wait_to_be_ended(_SECONDS_TO_BE_ENDED)
            raise

    return command


def _train(
    function: Callable[..., Recipe],
    arguments: tuple[str, ...],
    config: Path | None,
    out: Path | None,
    resume: Path | None,
    accept: tuple[str, ...],
    stop: StopRequest,
) -> int:
    from launcher.console.explain import explain
    from launcher.environment.accelerate_launch import accelerate_settings
    from launcher.environment.machine import read_machine
    from launcher.environment.world import find_world
    from launcher.recipe.resolve import reference_of
    from launcher.report.write import write_report
    from launcher.runs.job import RecipeSource, ResumeFrom, describe_run, plan_recipe
    from launcher.runs.ownership import own
    from launcher.runs.run_record import write_resumption
    from launcher.runs.rundir import RunDir, open_run_dir

    world = find_world()
    reference = reference_of(function)

    def count(counting: Callable[[], int]) -> int:
        if world.world_size == 1:
            return counting()
        from launcher.engine.worker import external_count

        return external_count(world, counting, stop=stop)

    overrides = (*accelerate_settings(), *read_overrides(config, arguments))
    built, plan = plan_recipe(
        reference,
        overrides,
        read_machine(),
        nodes=world.nodes,
        nproc_per_node=world.local_world_size,
        count=count,
    )
    if world.rank == 0:
        echo_if_possible(explain(plan, recipe=reference.shown))
    from launcher.engine.worker import external_rank

    held = ExitStack()
    atexit.register(held.close)  # a rank among several ends its process in `external_rank`

    def settle() -> RunDir:
        description = describe_run(reference, built, plan)
        if resume is None:
            return make_run_dir(out, plan.recipe, description, held)
        taken = open_run_dir(resume)
        held.enter_context(own(taken))
        write_resumption(taken, description)
        return taken

    start = ResumeFrom(fall_back=True, accept=accept) if resume is not None else None
    source = RecipeSource(recipe=reference.location, overrides=overrides)
    try:
        return external_rank(
            built.recipe,
            plan,
            world,
            settle,
            stop=stop,
            start=start,
            source=source,
            write_report=write_report,
        )
    finally:
        held.close()  # the program may go on after `main`


def _help(function: Callable[..., Recipe]) -> str:
    sentence = (function.__doc__ or f"Train {function.__name__}.").strip()
    return (
        f"{sentence}\n\nTrains as the ranks that it is started as: one process here, as many as "
        "torchrun, accelerate launch or deepspeed start. `launcher run` uses all GPUs."
    )
