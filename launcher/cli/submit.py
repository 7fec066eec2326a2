"""`launcher submit`: plan a run, write its batch script and submit it to Slurm."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from launcher.cli.arguments import (
    HEALTH_LEVELS,
    MAX_NODES,
    Count,
    config_option,
    freezing_options,
    nproc_option,
    out_option,
    overrides_argument,
    recipe_argument,
)
from launcher.cli.settings_command import SettingsCommand
from launcher.console.echo import echo
from launcher.errors import UsageError
from launcher.recipe.text_values import digits


class NodeRange(click.ParamType[tuple[int, int]]):
    """A number of nodes, or a range MIN:MAX."""

    name = "nodes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        first, colon, second = str(value).partition(":")
        low = digits(first)
        high = digits(second) if colon else low
        if not (low and high and low <= high <= MAX_NODES):
            self.fail(
                f"{str(value)[:50]!r}: expected a number of nodes, or a range such as 2:4.",
                param,
                ctx,
            )
        return low, high


class SubmitCommand(SettingsCommand):
    """A command whose option --array takes all words up to the next option."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        expanded: list[str] = []
        in_array = False
        for word in args:
            in_array = word == "--array" or (in_array and not word.startswith("-"))
            if word != "--array":
                expanded += ["--array", word] if in_array else [word]
        if "--array" in args and "--array" not in expanded:
            raise UsageError("--array needs settings to vary, such as lr=0.1,0.2 seed=1,2.")
        return super().parse_args(ctx, expanded)


@click.command(cls=SubmitCommand, short_help="Submit a run, or an array of runs, to Slurm.")
@recipe_argument
@overrides_argument
@click.option(
    "--nodes",
    type=NodeRange(),
    default="1",
    metavar="M[:MAX]",
    help="Number of nodes; 2:4 lets Slurm start the job on 2 to 4.",
)
@click.option(
    "--gpus-per-node",
    type=Count(min=0, largest=MAX_NODES),
    metavar="G",
    help="GPUs of each node. Default: all in the site profile; 0 trains on CPU ranks.",
)
@nproc_option
@click.option("--time", metavar="T", help="Time limit in Slurm's format: 90, 12:00:00, 2-00:00:00.")
@click.option("--cluster", metavar="NAME", help="Site profile: a YAML file, or its name in slurm/.")
@click.option(
    "--array",
    "axes",
    multiple=True,
    metavar="NAME=V1,V2...",
    help="Submit a job array with a run for each combination of values.",
)
@click.option("--dry-run", is_flag=True, help="Print the script; write and submit nothing.")
@config_option
@out_option
@freezing_options
@click.option(
    "--health",
    type=click.Choice(HEALTH_LEVELS),
    help="Examine each node before its ranks start, and queue the job again without those that are "
    "not fit. Default: that of the site profile, or quick.",
)
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nodes: tuple[int, int],
    gpus_per_node: int | None,
    nproc_per_node: int | None,
    time: str | None,
    cluster: str | None,
    axes: tuple[str, ...],
    config: Path | None,
    out: Path | None,
    code_limit: int | None,
    health: Literal["off", "quick", "full"] | None,
    *,
    freezes: bool,
    dry_run: bool,
) -> None:
    """Plan RECIPE for nodes of a cluster, write its batch script and submit it.

    Before its time limit or when it is preempted, the job saves a checkpoint; Slurm requeues it and
    it resumes. `launcher status`, `logs` and `cancel` take the printed run folder.

    \b
    launcher submit digits --nodes 2 -n 2 --dry-run
    launcher submit recipes/digits.py --nodes 2 --gpus-per-node 4 --time 2:00:00 --cluster lab
    launcher submit digits -n 2 epochs=5 --array lr=0.1,0.2,0.4 seed=1,2
    """
    from launcher.recipe.resolve import resolve
    from launcher.slurm.batch_job import SubmitRequest, combinations, prepare
    from launcher.slurm.script import render
    from launcher.slurm.site import find_site
    from launcher.slurm.submitting import check_script, submit_job

    site = find_site(cluster)
    request = SubmitRequest(
        reference=resolve(recipe),
        arguments=overrides,
        grid=combinations(axes) if axes else (),
        config=config,
        nodes=nodes,
        gpus_per_node=gpus_per_node,
        nproc_per_node=nproc_per_node,
        time=time,
        freezes=freezes,
        code_limit=code_limit,
        health=health,
        is_dry=dry_run,
    )
    prepared = prepare(request, site, out)
    if dry_run:
        echo(render(prepared.batch), newline=False, exact=True)
        echo(check_script(prepared), err=True)
        return
    job, folder = submit_job(prepared, request.grid)
    echo(f"job {job}" + (f", an array of {len(request.grid)}" if request.grid else ""))
    echo(f"run folder: {folder.shown}")
