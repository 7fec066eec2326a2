"""The command line of a recipe's file that Python, torchrun, accelerate or deepspeed runs."""

from __future__ import annotations

import atexit
import contextlib
import inspect
import itertools
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli import run_command
from launcher.cli.arguments import (
    accept_option,
    config_option,
    out_option,
    overrides_argument,
    read_overrides,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.standard_streams import prepare_streams
from launcher.cli.values import Folder
from launcher.environment.notebook import has_own_arguments
from launcher.errors import LostRankError, RecipeError, UsageError
from launcher.forking import suspect_all_threads
from launcher.recipe.recipe import Recipe
from launcher.signals import SECONDS_TO_BE_ENDED, StopRequest, handlers_restored

if TYPE_CHECKING:
    from launcher.planning.plan import Plan
    from launcher.recipe.resolve import Reference


def run_standalone(function: Callable[..., Recipe]) -> None:
    """Parse the command line of a recipe's file and train; exit the process on an error.

    When it returns, the previous signal handlers and output streams are installed again. In a
    notebook there is no command line, and an error is raised instead.
    """
    prepare_streams()
    suspect_all_threads()
    with (
        handlers_restored(),
        contextlib.redirect_stdout(sys.stdout),  # both restore the stream at the end
        contextlib.redirect_stderr(sys.stderr),
    ):
        code = run_command(_command(function)) if has_own_arguments() else _run_cell(function)
    if code:
        sys.exit(code)


def _run_cell(function: Callable[..., Recipe]) -> int:
    """Train with the settings of the recipe, in a notebook, which goes on; return 0.

    Raises:
        LauncherError: The recipe is wrong, or the run failed.
        KeyboardInterrupt: The cell was interrupted before the first step.
    """
    try:
        _command(function, in_notebook=True).main([], function.__name__, standalone_mode=False)
    except click.Abort:
        raise KeyboardInterrupt from None
    return 0


def _command(function: Callable[..., Recipe], *, in_notebook: bool = False) -> click.Command:
    stop = StopRequest()
    stop.listen()  # importing torch takes seconds, in which a signal may arrive

    @click.command(
        cls=SettingsCommand,
        function=function,
        help=_help(function),
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    @overrides_argument
    @config_option
    @out_option
    @click.option("--local_rank", "--local-rank", hidden=True, expose_value=False)  # deepspeed's
    @click.option(
        "--resume",
        type=Folder(),
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
            return _train(
                function, overrides, config, out, resume, accept, stop, in_notebook=in_notebook
            )
        except (UsageError, LostRankError):
            # Every rank of a node usually finds the same mistake. The first one reports it and
            # exits, whereupon the launcher ends the others. A rank that is not ended within some
            # seconds was the only one to find the mistake, and reports it.
            if os.environ.get("LOCAL_RANK", "0") != "0":
                stop.wait_to_be_ended(SECONDS_TO_BE_ENDED)
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
    *,
    in_notebook: bool,
) -> int:
    from launcher.console.echo import echo_if_possible
    from launcher.console.explain import summarize
    from launcher.environment.accelerate_launch import accelerate_settings
    from launcher.environment.machine import read_machine
    from launcher.environment.unused_configuration import unused_note
    from launcher.environment.world import find_world, machine_of
    from launcher.launch.run_folder import open_run_folder
    from launcher.launch.typed_recipe import importable, keep_recipe
    from launcher.recipe.resolve import reference_of
    from launcher.report.write import write_report
    from launcher.runs.job import RecipeSource, ResumeFrom
    from launcher.runs.ownership import own_run_dir
    from launcher.runs.plan_recipe import describe_run, plan_recipe
    from launcher.runs.run_record import write_resumption
    from launcher.runs.rundir import RunDir, open_run_dir

    started = time.monotonic()
    world = find_world()
    ownership = ExitStack()
    atexit.register(ownership.close)  # external_rank exits the process if there are several ranks
    reference = reference_of(function)
    if in_notebook:
        with contextlib.suppress(RecipeError):  # the run takes place here, and cannot be resumed
            reference = ownership.enter_context(importable(reference))

    def count_once(count: Callable[[], int]) -> int:
        if world.world_size == 1:
            return count()
        from launcher.engine.external import external_count

        return external_count(world, count, stop=stop)

    overrides = (*accelerate_settings(), *read_overrides(config, arguments))
    built, plan = plan_recipe(
        reference,
        overrides,
        machine_of(read_machine(), world),
        nodes=world.nodes,
        nproc_per_node=world.local_world_size,
        count=count_once,
    )
    if note := unused_note(_configuration(built.recipe, plan)):
        plan = replace(plan, notes=(*plan.notes, note))
    if world.rank == 0:
        more = "`launcher plan` shows every number"
        echo_if_possible(summarize(plan, recipe=reference.shown, more=more))
        if in_notebook:
            echo_if_possible(_advice_for_notebooks(reference))
    from launcher.engine.external import external_rank

    def settle_run_dir() -> RunDir:
        description = describe_run(reference, built, plan)
        if resume is None:
            run_dir = open_run_folder(out, plan.recipe, description, ownership)
            keep_recipe(reference, run_dir)
            return run_dir
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
            started=started,
            write_report=write_report,
            ends_process=not in_notebook,
        )
    finally:
        ownership.close()  # the program may continue after `main`


def _configuration(recipe: Recipe, plan: Plan) -> Mapping[str, Any]:
    """Return the DeepSpeed configuration of a run; empty if it does not use DeepSpeed."""
    from launcher.planning.configs import deepspeed_config
    from launcher.planning.strategy import STRATEGIES

    return deepspeed_config(recipe, plan) if STRATEGIES[plan.strategy].uses_deepspeed else {}


def _advice_for_notebooks(reference: Reference) -> str:
    """Return how to give settings to the recipe, and to get its result, in a notebook."""
    return (
        f"main() reads no arguments in a notebook. launcher.run({reference.function.__name__}, "
        "epochs=1) takes settings, uses all GPUs and returns the result."
    )


def _summary(function: Callable[..., Recipe]) -> str:
    """Return the docstring of a recipe function without its sections, such as `Args:`."""
    paragraphs = (inspect.getdoc(function) or "").split("\n\n")
    return "\n\n".join(
        itertools.takewhile(lambda text: not re.match(r"[A-Z][A-Za-z ]*:\n ", text), paragraphs)
    )


def _help(function: Callable[..., Recipe]) -> str:
    sentence = _summary(function) or f"Train {function.__name__}."
    return (
        f"{sentence}\n\nTrains as one rank of the group that started it: alone under Python, or as "
        "one of the processes of torchrun, accelerate launch or deepspeed. `launcher run` starts "
        "one rank for each GPU."
    )
