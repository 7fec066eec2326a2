"""`launcher resume`: go on with a run, from its newest checkpoint, on any number of ranks."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.arguments import (
    SettingsCommand,
    accept_option,
    max_restarts_option,
    nodes_options,
    nproc_option,
    output_mode,
    output_options,
    overrides_argument,
)
from launcher.cli.completing import complete_runs
from launcher.cli.start import find_machines, start, start_on_hosts
from launcher.errors import CheckpointError, RunDirError

if TYPE_CHECKING:
    from launcher.planning.plan import Plan
    from launcher.recipe.overrides import BuiltRecipe
    from launcher.runs.checkpoints import Checkpoint
    from launcher.runs.manifest import Manifest
    from launcher.runs.rundir import RunDir


@click.command(cls=SettingsCommand, short_help="Go on with a run from a checkpoint.")
@click.argument("run_dir", type=click.Path(path_type=Path), shell_complete=complete_runs)
@overrides_argument
@nproc_option
@nodes_options
@click.option(
    "--from", "name", metavar="STEP", help="The checkpoint, such as 120; default: newest."
)
@click.option(
    "--auto", is_flag=True, help="Where it is damaged, take the newest before it that is not."
)
@accept_option
@max_restarts_option
@output_options
def command(
    run_dir: Path,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    nodes: int | None,
    rendezvous: str | None,
    hosts: tuple[str, ...] | None,
    ssh: str | None,
    join_timeout: float | None,
    name: str | None,
    accept: tuple[str, ...],
    max_restarts: int,
    *,
    auto: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Go on with the run in RUN_DIR where its newest checkpoint is, to the sample.

    The recipe and its settings are those of the run, less what NAME=VALUE gives anew. The number of
    ranks and the strategy may be others.

    \b
    launcher resume runs/digits-20260101-120000
    launcher resume runs/digits-20260101-120000 -n 4 strategy=fsdp
    launcher resume runs/digits-20260101-120000 --from 120 epochs=40
    """
    from launcher.environment.machine import read_machine
    from launcher.launch.launcher import SignalHandler
    from launcher.launch.multi_node import check_restarts, joined, make_run_dir_once
    from launcher.recipe.overrides import Override, build, read_arguments
    from launcher.recipe.resolve import resolve
    from launcher.runs.job import ResumeFrom, describe_run, plan_recipe
    from launcher.runs.ownership import check_unowned, own
    from launcher.runs.resumption import check_resumable
    from launcher.runs.run_record import read_run, write_resumption
    from launcher.runs.rundir import open_run_dir

    signals = SignalHandler()  # before anything slow
    showing = output_mode(quiet=quiet, as_json=as_json)
    here = Path.cwd()
    machines = find_machines(hosts, nodes, rendezvous, join_timeout)
    check_restarts(machines, max_restarts)
    folder = open_run_dir(run_dir)
    check_unowned(folder.path)
    said, text = read_run(folder), folder.run_yaml.read_text(encoding="utf-8")
    chosen = _choose(folder, name, said.recipe)
    if Path.cwd() != Path(said.folder) and Path(said.folder).is_dir():
        os.chdir(said.folder)  # what the recipe reads may be named from there
    reference = resolve(said.recipe)
    before = [
        Override(name=each, value=value, source="run.yaml")
        for each, value in said.overrides.items()
    ]
    given = (*before, *read_arguments(overrides))
    nproc = nproc_per_node or said.nproc_per_node
    built, plan = plan_recipe(
        reference,
        given,
        read_machine(),
        nodes=machines.count if machines else 1,
        nproc_per_node=nproc,
        elsewhere=hosts is not None,
    )
    manifest = _read_manifest(folder, chosen, auto=auto)
    if manifest is not None:
        check_resumable(manifest, plan, chosen.name, accept)
        if manifest.step >= plan.total_steps and folder.result.exists():
            click.echo(
                f"{folder.shown} is finished: {manifest.step:,} of {plan.total_steps:,} steps are "
                "taken. More epochs=... or steps=... would go on with it."
            )
            return 0
    if hosts is not None:
        return start_on_hosts(hosts, here, rendezvous, ssh)
    description = describe_run(reference, built, plan)

    with contextlib.ExitStack() as held, joined(machines, plan) as joint:

        def make() -> RunDir:
            held.enter_context(own(folder, with_ranks=True))
            if not chosen.path.is_dir():
                raise CheckpointError(
                    f"{chosen.path} is gone: another process went on with the run while this one "
                    "started. Give the same command again."
                )
            write_resumption(folder, description)
            return folder

        return start(
            reference,
            given,
            plan,
            make_run_dir_once(joint, make),
            signals=signals,
            output_mode=showing,
            restarts=max_restarts,
            rendezvous=joint,
            begin=ResumeFrom(step=chosen.step, fall_back=auto, accept=accept),
            changes=_changes(manifest, said.plan, build(reference, before), (built, plan)),
            restores=text,
        )


def _choose(folder: RunDir, name: str | None, recipe: str) -> Checkpoint:
    """Return the checkpoint called `name`, or the newest.

    Raises:
        CheckpointError: There is none.
    """
    from launcher.runs.checkpoints import find_checkpoint, list_checkpoints

    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder.shown} has no checkpoint: the run ended before its first. Start it anew with "
            f"`launcher run {recipe}`."
        )
    return found[0] if name is None else find_checkpoint(folder, name)


def _read_manifest(folder: RunDir, chosen: Checkpoint, *, auto: bool) -> Manifest | None:
    """Return what the chosen checkpoint says of itself; None where the ranks take an earlier one.

    Raises:
        CheckpointError: It is damaged, and none is to be taken in its place.
    """
    from launcher.runs.checkpoints import damage_error, list_checkpoints

    try:
        return chosen.read_manifest()
    except CheckpointError as error:
        earlier = [each for each in list_checkpoints(folder) if each.step < chosen.step]
        if not (auto and earlier):
            raise damage_error(chosen, str(error), earlier) from None
        return None


def _changes(
    manifest: Manifest | None,
    planned: Mapping[str, Any],
    was: BuiltRecipe,
    now: tuple[BuiltRecipe, Plan],
) -> list[str]:
    """Return what the run goes on with that is not as it was, in words.

    Args:
        manifest: Of the checkpoint; None where it cannot be read.
        planned: The plan of the run that was, as run.yaml has it.
        was: Its recipe.
        now: The recipe and the plan that it goes on with.
    """
    from launcher.console.explain import schedule_change
    from launcher.planning.plan import Plan
    from launcher.runs.resumption import changes

    if manifest is None:
        return []
    built, plan = now
    told = changes(manifest, plan)
    with contextlib.suppress(RunDirError):  # a plan of an earlier version
        before = Plan.from_dict(planned), was.recipe.schedule
        if path := schedule_change(manifest.step, before, (plan, built.recipe.schedule)):
            told.append(path)
    return told
