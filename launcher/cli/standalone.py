"""The command line of a recipe's file that Python, torchrun, accelerate or deepspeed runs."""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import click

from launcher.cli import run_command
from launcher.cli.arguments import (
    SettingsCommand,
    accept_option,
    config_option,
    out_option,
    overrides_argument,
    read_overrides,
)
from launcher.cli.standard_streams import prepare_streams
from launcher.errors import LostRankError, UsageError
from launcher.forking import suspect_all_threads
from launcher.recipe.recipe import Recipe
from launcher.signals import StopRequest, handlers_restored

_SECONDS_TO_BE_ENDED = 5


def run_standalone(function: Callable[..., Recipe]) -> None:
    """Parse the command line of a recipe's file and train; exit the process on an error.

    When it returns, the previous signal handlers are installed again.
    """
    prepare_streams()
    suspect_all_threads()
    with handlers_restored():
        code = run_command(_command(function))
    if code:
        sys.exit(code)


def _command(function: Callable[..., Recipe]) -> click.Command:
    stop = StopRequest()
    stop.listen()  # importing torch takes seconds, in which a signal may arrive

    @click.command(cls=SettingsCommand, help=_help(function))
    @overrides_argument
    @config_option
    @out_option
    @click.option("--local_rank", "--local-rank", hidden=True, expose_value=False)  # deepspeed's
    @click.option(
        "--resume",
        type=click.Path(path_type=Path),
        metavar="RUN_DIR",
        help="Resume a run from its newest undamaged checkpoint.",
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
                f"--accept {accept[0]} applies to a resumed run: add --resume RUN_DIR."
            )
        if out is not None and resume is not None:
            raise UsageError(
                f"--out {out} makes a run folder and --resume {resume} continues one: keep one."
            )
        try:
            return _train(function, overrides, config, out, resume, accept, stop)
        except (UsageError, LostRankError):
            # Every rank of a node usually finds the same mistake. The first one reports it and
            # exits, whereupon the launcher ends the others. A rank that is not ended within some
            # seconds was the only one to find the mistake, and reports it.
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
    from launcher.console.echo import echo_if_possible
    from launcher.console.explain import explain
    from launcher.environment.accelerate_launch import accelerate_settings
    from launcher.environment.machine import read_machine
    from launcher.environment.world import find_world
    from launcher.launch.run_folder import open_run_folder
    from launcher.recipe.resolve import reference_of
    from launcher.report.write import write_report
    from launcher.runs.job import RecipeSource, ResumeFrom
    from launcher.runs.ownership import own_run_dir
    from launcher.runs.plan_recipe import describe_run, plan_recipe
    from launcher.runs.run_record import write_resumption
    from launcher.runs.rundir import RunDir, open_run_dir

    world = find_world()
    reference = reference_of(function)

    def count_once(count: Callable[[], int]) -> int:
        if world.world_size == 1:
            return count()
        from launcher.engine.external import external_count

        return external_count(world, count, stop=stop)

    overrides = (*accelerate_settings(), *read_overrides(config, arguments))
    built, plan = plan_recipe(
        reference,
        overrides,
        read_machine(),
        nodes=world.nodes,
        nproc_per_node=world.local_world_size,
        count=count_once,
    )
    if world.rank == 0:
        echo_if_possible(explain(plan, recipe=reference.shown))
    from launcher.engine.external import external_rank

    ownership = ExitStack()
    atexit.register(ownership.close)  # external_rank exits the process if there are several ranks

    def settle_run_dir() -> RunDir:
        description = describe_run(reference, built, plan)
        if resume is None:
            return open_run_folder(out, plan.recipe, description, ownership)
        run_dir = open_run_dir(resume)
        ownership.enter_context(own_run_dir(run_dir))
        write_resumption(run_dir, description)
        return run_dir

    start = ResumeFrom(fall_back=True, accept=accept) if resume is not None else None
    source = RecipeSource(recipe=reference.location, overrides=overrides)
    try:
        return external_rank(
            built.recipe,
            plan,
            world,
            settle_run_dir,
            stop=stop,
            start=start,
            source=source,
            write_report=write_report,
        )
    finally:
        ownership.close()  # the program may continue after `main`


def _help(function: Callable[..., Recipe]) -> str:
    sentence = (function.__doc__ or f"Train {function.__name__}.").strip()
    return (
        f"{sentence}\n\nTrains as one rank of the group that started it: alone under Python, or as "
        "one of the processes of torchrun, accelerate launch or deepspeed. `launcher run` starts "
        "one rank for each GPU."
    )
