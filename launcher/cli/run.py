"""`launcher run`: plan, start the ranks, train."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli.arguments import (
    SettingsCommand,
    accept_option,
    config_option,
    max_restarts_option,
    nodes_options,
    nproc_option,
    out_option,
    output_mode,
    output_options,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.cli.start import find_machines, make_run_dir, start, start_on_hosts
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.runs.rundir import RunDir


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
@output_options
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
    from launcher.environment.machine import read_machine
    from launcher.launch.launcher import SignalHandler
    from launcher.launch.multi_node import check_restarts, joined, make_run_dir_once
    from launcher.recipe.resolve import resolve
    from launcher.runs.checkpoints import list_checkpoints
    from launcher.runs.job import ResumeFrom, describe_run, plan_recipe

    signals = SignalHandler()  # before anything slow
    showing = output_mode(quiet=quiet, as_json=as_json)
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

    with ExitStack() as held, joined(machines, plan) as joint:

        def make() -> RunDir:
            if goes_on and out is not None and (out / "run.yaml").is_file():
                said.append((out / "run.yaml").read_text(encoding="utf-8"))
            return make_run_dir(
                out, plan.recipe, description, held, goes_on=goes_on, with_ranks=True
            )

        run_dir = make_run_dir_once(joint, make)
        begun = goes_on and list_checkpoints(run_dir)
        return start(
            reference,
            given,
            plan,
            run_dir,
            signals=signals,
            output_mode=showing,
            restarts=max_restarts,
            rendezvous=joint,
            begin=ResumeFrom(fall_back=True, accept=accept) if begun else None,
            restores=said[0] if begun and said else None,
        )
