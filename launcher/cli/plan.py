"""`launcher plan`: every derived number of a run, before any GPU is asked for."""

from __future__ import annotations

import json
from pathlib import Path

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    nproc_option,
    overrides_argument,
    read_overrides,
)
from launcher.errors import UsageError


@click.command(cls=SettingsCommand, short_help="Print what a run would be, with the arithmetic.")
@click.argument("recipe")
@overrides_argument
@nproc_option
@click.option("--nodes", type=click.IntRange(min=1), default=1, metavar="M", help="Nodes.")
@config_option
@click.option("--json", "as_json", is_flag=True, help="Print the plan as JSON.")
@click.option("--plot", is_flag=True, help="Draw the learning rate, and momentum if it is cycled.")
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    nodes: int,
    config: Path | None,
    as_json: bool,
    plot: bool,
) -> None:
    """Print what a run of RECIPE would be, with the arithmetic of every number.

    \b
    launcher plan digits
    launcher plan digits "schedule=cyclical(cycles=3)" --plot
    launcher plan digits -n 8 --nodes 2 device=cuda
    launcher plan recipes/digits.py:digits lr=0.2 batch_size=512 --json
    """
    from launcher.job import plan_recipe
    from launcher.machine import read_machine
    from launcher.report.explain import explain
    from launcher.resolve import resolve

    if plot and as_json:
        raise UsageError("--plot draws for people and --json prints for programs: give one.")
    reference = resolve(recipe)
    built, plan = plan_recipe(
        reference,
        read_overrides(config, overrides),
        read_machine(),
        nodes=nodes,
        nproc_per_node=nproc_per_node,
        elsewhere=True,
    )
    if as_json:
        click.echo(json.dumps(plan.to_dict()))
    else:
        click.echo(explain(plan, recipe=reference.shown))
    if plot:
        from launcher.report.plots import draw, schedule_plots

        for each in schedule_plots(built.recipe.schedule, plan):
            click.echo(f"\n{draw(each)}")
