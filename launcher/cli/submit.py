"""`launcher submit`: plan, write a batch script, hand it to Slurm."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

import click

from launcher.cli.arguments import (
    SettingsCommand,
    config_option,
    nproc_option,
    out_option,
    overrides_argument,
    recipe_argument,
)
from launcher.errors import UsageError


class NodeRange(click.ParamType[tuple[int, int]]):
    """M nodes, or at least MIN and at most MAX: MIN:MAX."""

    name = "nodes"

    def convert(
        self, value: object, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, colon, high = str(value).partition(":")
        high = high if colon else low
        if not (low.isdigit() and high.isdigit() and 0 < int(low) <= int(high)):
            self.fail(f"{value!r}: expected M, or MIN:MAX such as 2:4.", param, ctx)
        return int(low), int(high)


class SubmitCommand(SettingsCommand):
    """Takes all that follows --array, up to the next option, as its values."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        read: list[str] = []
        within = False
        for each in args:
            within = each == "--array" or (within and not each.startswith("-"))
            if each != "--array":
                read += ["--array", each] if within else [each]
        if "--array" in args and "--array" not in read:
            raise UsageError("--array: give what is to vary after it, such as lr=0.1,0.2 seed=1,2.")
        return super().parse_args(ctx, read)


@click.command(cls=SubmitCommand, short_help="Hand a run, or an array of runs, to Slurm.")
@recipe_argument
@overrides_argument
@click.option(
    "--nodes",
    type=NodeRange(),
    default="1",
    metavar="M[:MAX]",
    help="Nodes; 2:4 takes from 2 to 4, as there are when it starts.",
)
@click.option(
    "--gpus-per-node",
    type=click.IntRange(min=0),
    metavar="G",
    help="GPUs of each node. Default: all that the profile says; 0 trains on CPU ranks.",
)
@nproc_option
@click.option("--time", metavar="T", help="Time limit as Slurm has it: 90, 12:00:00, 2-00:00:00.")
@click.option("--cluster", metavar="NAME", help="Site profile: a YAML file, or its name in slurm/.")
@click.option(
    "--array",
    "axes",
    multiple=True,
    metavar="NAME=V1,V2...",
    help="A run for each combination of the values that follow, as one array of jobs.",
)
@click.option("--dry-run", is_flag=True, help="Print the script, and leave nothing behind.")
@config_option
@out_option
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
    *,
    dry_run: bool,
) -> None:
    """Plan RECIPE for nodes of a cluster, write its batch script and submit it.

    The job saves a checkpoint before its time is over or when it has to make room, is queued again
    and goes on. `launcher status`, `logs` and `cancel` take the run folder that is printed.

    \b
    launcher submit digits --nodes 2 -n 2 --dry-run
    launcher submit recipes/digits.py --nodes 2 --gpus-per-node 4 --time 2:00:00 --cluster lab
    launcher submit digits -n 2 epochs=5 --array lr=0.1,0.2,0.4 seed=1,2
    """
    from launcher.recipe.resolve import resolve
    from launcher.runs.rundir import create_run_dir, write_atomic
    from launcher.slurm.batch_job import SubmitRequest, combinations, prepare
    from launcher.slurm.queue import check, submit
    from launcher.slurm.script import render
    from launcher.slurm.site import find_site

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
    )
    prepared = prepare(request, site, out)
    script = render(prepared.batch)
    if dry_run:
        click.echo(script, nl=False)
        if shutil.which("sbatch") is None:
            click.echo("launcher: not looked at by sbatch, which is not installed here", err=True)
            return
        with tempfile.TemporaryDirectory() as place:
            path = Path(place) / "job.sbatch"
            write_atomic(path, script)
            click.echo(check(str(path)), err=True)
        return
    made = create_run_dir(prepared.folder, prepared.plans[0].recipe)
    try:
        path = made.path / "job.sbatch"
        write_atomic(path, script)
        prepared.save("", request.grid)  # the job may start before it has told us its id
        check(str(path))
        job = submit(str(path))
    except BaseException:
        shutil.rmtree(made.path)
        raise
    prepared.save(job, request.grid)
    click.echo(f"job {job}" + (f", an array of {len(request.grid)}" if request.grid else ""))
    click.echo(f"run folder: {made.shown}")
