"""`launcher run`: plan, start the ranks, train."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.arguments import (
    SettingsCommand,
    accept_option,
    config_option,
    max_restarts_option,
    nodes_options,
    nproc_option,
    out_option,
    overrides_argument,
    read_overrides,
    recipe_argument,
    shows,
    shows_options,
)
from launcher.cli.start import find_machines, start, start_on_hosts
from launcher.errors import EXIT_USAGE, UsageError


@click.command(cls=SettingsCommand, short_help="Train a recipe.")
@recipe_argument
@overrides_argument
@nproc_option
@nodes_options
@config_option
@out_option
@click.option(
    "--continue",
    "goes_on",
    is_flag=True,
    help="Where --out has been begun, go on from its newest undamaged checkpoint.",
)
@accept_option
@max_restarts_option
@shows_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    nodes: int | None,
    rendezvous: str | None,
    hosts: tuple[str, ...] | None,
    ssh: str | None,
    join_timeout: float | None,
    config: Path | None,
    out: Path | None,
    accept: tuple[str, ...],
    max_restarts: int,
    *,
    goes_on: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Train RECIPE on the GPUs of this machine, or on CPU ranks where there are none.

    On several machines the command is typed on each; or once, with --hosts, and ssh starts it; or
    srun does, as one task on each.

    \b
    launcher run digits
    launcher run recipes/digits.py -n 4 lr=0.2 epochs=3
    launcher run digits --config mine.yaml --out runs/mine
    launcher run digits --nodes 2 --rendezvous node1 --out /shared/mine
    launcher run digits --hosts node1,node2 --out /shared/mine
    """
    from launcher.checkpoints import list_checkpoints
    from launcher.job import Start, describe_run, plan_recipe
    from launcher.launch import Stops
    from launcher.machine import read_machine
    from launcher.multinode import check_restarts, make_once, met
    from launcher.resolve import resolve
    from launcher.rundir import (
        RunDir,
        create_run_dir,
        open_run_dir,
        write_atomic,
        write_resumption,
        write_yaml,
    )

    stops = Stops()  # before anything slow
    showing = shows(quiet=quiet, as_json=as_json)
    if goes_on and out is None:
        raise UsageError("--continue goes on with the run in --out: give that folder as well.")
    if accept and not goes_on:
        raise UsageError(
            f"--accept {accept[0]} is about a run that goes on: give --continue as well."
        )
    machines = find_machines(hosts, nodes, rendezvous, join_timeout)
    check_restarts(machines, max_restarts)
    reference = resolve(recipe)
    given = read_overrides(config, overrides)
    built, plan = plan_recipe(
        reference,
        given,
        read_machine(),
        nodes=machines.count if machines else 1,
        nproc_per_node=nproc_per_node,
        elsewhere=hosts is not None,
    )
    if hosts is not None:
        return start_on_hosts(hosts, Path.cwd(), rendezvous, ssh)
    description = describe_run(reference, built, plan)
    said: list[str] = []

    def make() -> RunDir:
        if goes_on and out is not None and (out / "run.yaml").is_file():
            begun = open_run_dir(out)
            said.append(begun.run_yaml.read_text(encoding="utf-8"))
            write_resumption(begun, description)
            return begun
        if goes_on and out is not None and (out / "submission.json").is_file():
            made = RunDir(out.resolve())  # made by `launcher submit`
        else:
            made = create_run_dir(out, plan.recipe)
        write_yaml(made.run_yaml, description)
        return made

    with met(machines, plan) as meeting:
        run_dir = make_once(meeting, make)
        begun = goes_on and list_checkpoints(run_dir)
        code = start(
            reference,
            given,
            plan,
            run_dir,
            stops=stops,
            shows=showing,
            restarts=max_restarts,
            meeting=meeting,
            begin=Start(fall_back=True, accept=accept) if begun else None,
        )
    if code == EXIT_USAGE and begun and said:  # it was refused: the run is what it was
        write_atomic(run_dir.run_yaml, said[0])
    return code
