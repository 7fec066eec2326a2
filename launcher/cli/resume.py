"""`launcher resume`: go on with a run, from its newest checkpoint, on any number of ranks."""

from __future__ import annotations

import os
from pathlib import Path

import click

from launcher.cli.arguments import (
    SettingsCommand,
    accept_option,
    max_restarts_option,
    nodes_options,
    nproc_option,
    overrides_argument,
    shows,
    shows_options,
)
from launcher.cli.completing import complete_runs
from launcher.cli.start import find_machines, start, start_on_hosts


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
@shows_options
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
    from launcher.checkpoints import changes, check_resumable, find_checkpoint, list_checkpoints
    from launcher.errors import EXIT_USAGE, CheckpointError
    from launcher.job import Start, describe_run, plan_recipe
    from launcher.launch import Stops
    from launcher.machine import read_machine
    from launcher.multinode import check_restarts, make_once, met
    from launcher.overrides import Override, read_arguments
    from launcher.resolve import resolve
    from launcher.rundir import (
        RunDir,
        open_run_dir,
        read_run,
        write_atomic,
        write_resumption,
    )

    stops = Stops()  # before anything slow
    showing = shows(quiet=quiet, as_json=as_json)
    here = Path.cwd()
    machines = find_machines(hosts, nodes, rendezvous, join_timeout)
    check_restarts(machines, max_restarts)
    folder = open_run_dir(run_dir)
    said = read_run(folder)
    found = list_checkpoints(folder)
    if not found:
        raise CheckpointError(
            f"{folder.shown} has no checkpoint: the run ended before its first. Start it anew with "
            f"`launcher run {said['recipe']}`."
        )
    chosen = found[0] if name is None else find_checkpoint(folder, name)
    if Path.cwd() != Path(said["folder"]) and Path(said["folder"]).is_dir():
        os.chdir(said["folder"])  # what the recipe reads may be named from there
    reference = resolve(said["recipe"])
    before = [
        Override(name=each, value=value, source="run.yaml")
        for each, value in said["overrides"].items()
    ]
    given = (*before, *read_arguments(overrides))
    nproc = nproc_per_node or int(said["plan"]["nproc_per_node"])
    built, plan = plan_recipe(
        reference,
        given,
        read_machine(),
        nodes=machines.count if machines else 1,
        nproc_per_node=nproc,
        elsewhere=hosts is not None,
    )
    try:
        manifest = chosen.read_manifest()
    except CheckpointError:
        manifest = None  # told where the ranks look for another
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

    def make() -> RunDir:
        write_resumption(folder, description)
        return folder

    before_it = folder.run_yaml.read_text(encoding="utf-8")
    with met(machines, plan) as meeting:
        code = start(
            reference,
            given,
            plan,
            make_once(meeting, make),
            stops=stops,
            shows=showing,
            restarts=max_restarts,
            meeting=meeting,
            begin=Start(step=chosen.step, fall_back=auto, accept=accept),
            changes=changes(manifest, plan) if manifest is not None else (),
        )
    if code == EXIT_USAGE:  # it was refused: the run is what it was
        write_atomic(folder.run_yaml, before_it)
    return code
