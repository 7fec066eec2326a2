"""`launcher submit`: plan a run, describe its job as text and submit it to a scheduler."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from launcher.cli.arguments import (
    HEALTH_LEVELS,
    MAX_RESTARTS,
    config_option,
    freezing_options,
    nproc_option,
    out_option,
    overrides_argument,
    recipe_argument,
)
from launcher.cli.node_options import node_timeout_option, spares_option
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.values import MAX_NODES, URL, Count, NodeRange
from launcher.console.echo import echo
from launcher.errors import UsageError

if TYPE_CHECKING:
    from launcher.schedulers.submission import SchedulerName

_SCHEDULERS = ("slurm", "kubernetes", "ssh", "skypilot")
"""The values of --to, written out because --help is not to import the schedulers."""


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


@click.command(cls=SubmitCommand, short_help="Submit a run to Slurm, Kubernetes or hosts.")
@recipe_argument
@overrides_argument
@click.option(
    "--to",
    "scheduler_name",
    type=click.Choice(_SCHEDULERS),
    default=_SCHEDULERS[0],
    show_default=True,
    help="Where the job is submitted. ssh starts it on hosts in the background; skypilot writes a "
    "task file, with --dry-run.",
)
@click.option(
    "--nodes",
    type=NodeRange(),
    default="1",
    metavar="M[:MAX]",
    help="Number of nodes; 2:4 lets Slurm start the job on 2 to 4, and with --max-restarts go on "
    "with as few.",
)
@spares_option
@click.option(
    "--max-restarts",
    type=Count(min=0, largest=MAX_RESTARTS),
    default=0,
    metavar="N",
    help="In Slurm: if a rank fails or a node is lost, restart within the job, at most N times.",
)
@node_timeout_option
@click.option(
    "--gpus-per-node",
    type=Count(min=0, largest=MAX_NODES),
    metavar="G",
    help="GPUs of each node. Default: those of the site profile, or what Slurm says that as many "
    "nodes have; 0 trains on CPU ranks.",
)
@nproc_option
@click.option("--time", metavar="T", help="Time limit in Slurm's format: 90, 12:00:00, 2-00:00:00.")
@click.option(
    "--cluster",
    metavar="NAME",
    help="Site profile: a YAML file, or its name in a folder called as --to, such as slurm/.",
)
@click.option(
    "--array",
    "axes",
    multiple=True,
    metavar="NAME=V1,V2...",
    help="Submit a run for each combination of values: a job array in Slurm, a job each in "
    "Kubernetes.",
)
@click.option(
    "--array-cap",
    type=Count(min=1, largest=MAX_NODES),
    metavar="N",
    help="In Slurm: train at most N runs of the array at the same time.",
)
@click.option(
    "--dependency",
    metavar="SPEC",
    help="In Slurm: start after other jobs, as sbatch takes it: afterok:1234.",
)
@click.option("--reservation", metavar="NAME", help="In Slurm: use the nodes of a reservation.")
@click.option(
    "--mail-type", metavar="EVENTS", help="In Slurm: events that are mailed, such as END,FAIL."
)
@click.option("--mail-user", metavar="ADDRESS", help="In Slurm: where mail goes.")
@click.option("--dry-run", is_flag=True, help="Print the job as text; write and submit nothing.")
@config_option
@out_option
@click.option(
    "--mirror",
    type=URL(),
    metavar="URL",
    help="Keep the run in an object store as well, as `launcher run --mirror` does.",
)
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
    scheduler_name: SchedulerName,
    nodes: tuple[int, int],
    spares: int,
    max_restarts: int,
    node_timeout: float | None,
    gpus_per_node: int | None,
    nproc_per_node: int | None,
    time: str | None,
    cluster: str | None,
    axes: tuple[str, ...],
    array_cap: int | None,
    dependency: str | None,
    reservation: str | None,
    mail_type: str | None,
    mail_user: str | None,
    config: Path | None,
    out: Path | None,
    mirror: str | None,
    code_limit: int | None,
    health: Literal["off", "quick", "full"] | None,
    *,
    freezes: bool,
    dry_run: bool,
) -> None:
    """Plan RECIPE for nodes of a cluster, write its batch script or manifests and submit it.

    When it is preempted, and in Slurm before its time limit, the job saves a checkpoint; the
    scheduler starts it again and it resumes. `launcher status`, `logs` and `cancel` take the
    printed run folder.

    \b
    launcher submit digits --nodes 2 -n 2 --dry-run
    launcher submit recipes/digits.py --nodes 2 --gpus-per-node 4 --time 2:00:00 --cluster lab
    launcher submit digits -n 2 epochs=5 --array lr=0.1,0.2,0.4 seed=1,2
    launcher submit digits --to kubernetes --cluster lab --nodes 2 --gpus-per-node 8
    """
    from launcher.recipe.resolve import resolve
    from launcher.schedulers.request import Queueing, Restarting, SubmitRequest, combinations
    from launcher.schedulers.scheduler import find_scheduler

    _check_restarting(scheduler_name, nodes, spares, max_restarts, node_timeout)
    queueing = Queueing(
        array_cap=array_cap,
        dependency=dependency,
        reservation=reservation,
        mail_type=mail_type,
        mail_user=mail_user,
    )
    _check_queueing(scheduler_name, queueing.given, has_array=bool(axes))
    if mirror is not None and axes:
        raise UsageError(
            f"--mirror {mirror} is the place of one run, and --array submits several: leave one of "
            "them out, or submit the runs one by one."
        )
    scheduler = find_scheduler(scheduler_name)
    request = SubmitRequest(
        reference=resolve(recipe),
        arguments=overrides,
        grid=combinations(axes) if axes else (),
        config=config,
        nodes=nodes,
        restarting=Restarting(max_restarts=max_restarts, spares=spares, node_timeout=node_timeout),
        queueing=queueing,
        gpus_per_node=gpus_per_node,
        nproc_per_node=nproc_per_node,
        time=time,
        freezes=freezes,
        code_limit=code_limit,
        health=health,
        mirror=mirror,
        is_dry=dry_run,
    )
    prepared = scheduler.prepare(request, cluster, out)
    if dry_run:
        echo(prepared.text, newline=False, exact=True)
        echo(scheduler.check(prepared), err=True)
        return
    job, folder = scheduler.submit(prepared)
    echo(f"job {job}" + (f", an array of {len(request.grid)}" if request.grid else ""))
    echo(f"run folder: {folder.shown}")


def _check_restarting(
    scheduler: str,
    nodes: tuple[int, int],
    spares: int,
    max_restarts: int,
    node_timeout: float | None,
) -> None:
    """Refuse options of restarts within a job where nothing restarts.

    Raises:
        UsageError: There is one.
    """
    given = {
        "--spares": spares,
        "--max-restarts": max_restarts,
        "--node-timeout": node_timeout,
    }
    names = [name for name, value in given.items() if value]
    if names and scheduler != "slurm":
        raise UsageError(
            f"{names[0]} {given[names[0]]}: only a job of Slurm restarts on the nodes that it has, "
            f"and this one goes to {scheduler}. Leave {names[0]} out."
        )
    if spares and not max_restarts:
        raise UsageError(
            f"--spares {spares}: a spare node takes the place of a lost one when the run restarts. "
            "Add --max-restarts N."
        )
    if names and nodes == (1, 1) and not spares:
        raise UsageError(
            f"{names[0]} {given[names[0]]}: the launchers of several nodes restart a run within "
            "its job, and this job has one node. Slurm queues it again when the node is lost: "
            f"leave {names[0]} out, or add --spares K."
        )


def _check_queueing(scheduler: str, given: dict[str, object], *, has_array: bool) -> None:
    """Refuse options of Slurm's queue where there is none, and a cap without an array.

    Raises:
        UsageError: There is one.
    """
    if given and scheduler != "slurm":
        name, value = next(iter(given.items()))
        raise UsageError(
            f"{name} {value}: only Slurm has this, and the job goes to {scheduler}. Leave {name} "
            "out."
        )
    if "--array-cap" in given and not has_array:
        raise UsageError(
            f"--array-cap {given['--array-cap']} limits how many runs of an array train at the "
            "same time, and this is one run. Add --array NAME=V1,V2, or leave --array-cap out."
        )
