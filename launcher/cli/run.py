"""`launcher run`: plan, start the ranks, train."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    max_restarts_option,
    nproc_option,
    out_option,
    overrides_argument,
    read_overrides,
)
from launcher.cli.start import start


@click.command(cls=SettingsCommand, short_help="Train a recipe.")
@click.argument("recipe")
@overrides_argument
@nproc_option
@config_option
@out_option
@max_restarts_option
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    config: Path | None,
    out: Path | None,
    max_restarts: int,
) -> int:
    """Train RECIPE on the GPUs of this machine, or on CPU ranks where there are none.

    \b
    launcher run digits
    launcher run recipes/digits.py -n 4 lr=0.2 epochs=3
    launcher run digits --config mine.yaml --out runs/mine
    """
    from launcher.job import describe_run, plan_recipe
    from launcher.launch import Stops
    from launcher.machine import read_machine
    from launcher.resolve import resolve
    from launcher.rundir import create_run_dir, write_yaml

    stops = Stops()  # before anything slow
    reference = resolve(recipe)
    given = read_overrides(config, overrides)
    built, plan = plan_recipe(reference, given, read_machine(), nproc_per_node=nproc_per_node)
    run_dir = create_run_dir(out, plan.recipe)
    write_yaml(run_dir.run_yaml, describe_run(reference, built, plan))
    return start(reference, given, plan, run_dir, stops=stops, restarts=max_restarts)
