"""`launcher resume`: resume a run from a checkpoint, on any number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import click

from launcher.cli.arguments import (
    accept_option,
    code_change_option,
    freezing_options,
    health_option,
    mirror_options,
    nproc_option,
    output_mode,
    output_options,
    overrides_argument,
    read_overrides,
)
from launcher.cli.completing import complete_runs
from launcher.cli.machines import MachineOptions
from launcher.cli.node_options import run_nodes_options
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.sweep import resume_sweep
from launcher.cli.values import Folder, FolderOrURL
from launcher.console.echo import echo
from launcher.errors import LauncherError, StoreError, UsageError


@click.command(cls=SettingsCommand, short_help="Resume a run from a checkpoint.")
@click.argument("run_dir", type=FolderOrURL(), shell_complete=complete_runs)
@overrides_argument
@nproc_option
@run_nodes_options
@click.option(
    "--from",
    "checkpoint",
    metavar="STEP",
    help="Resume from this checkpoint, such as 120. Default: the newest.",
)
@click.option(
    "--auto",
    "fall_back",
    is_flag=True,
    help="If the checkpoint is damaged, resume from the newest older one that is not.",
)
@click.option(
    "--out",
    type=Folder(),
    metavar="DIR",
    help="With a URL: the folder to download the run to. Default: runs/<last part of the URL>.",
)
@mirror_options
@accept_option
@code_change_option
@freezing_options
@health_option
@output_options
def command(
    run_dir: Path | str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    checkpoint: str | None,
    out: Path | None,
    mirror: str | None,
    mirror_timeout: float,
    accept: tuple[str, ...],
    code_limit: int | None,
    health: Literal["off", "quick", "full"],
    *,
    machines: MachineOptions,
    allow_code_change: bool,
    freezes: bool,
    fall_back: bool,
    quiet: bool,
    as_json: bool,
) -> int:
    """Resume the run in RUN_DIR from its newest checkpoint, to the sample.

    If RUN_DIR is a URL, the run is downloaded from there first, and mirrored there from then on.

    The recipe and its settings are those of the run, except what NAME=VALUE changes. The number of
    ranks and the strategy may change. If RUN_DIR is the folder of `launcher sweep`, the sweep
    continues.

    \b
    launcher resume runs/digits-20260101-120000
    launcher resume runs/digits-20260101-120000 -n 4 strategy=fsdp
    launcher resume runs/digits-20260101-120000 --from 120 epochs=40
    launcher resume s3://bucket/runs/mine
    """
    from launcher.checks.health_gate import health_check
    from launcher.launch.mirroring import upload_rest
    from launcher.launch.prepare import ResumeRequest, prepare_resume
    from launcher.launch.remote_run import fetch_run, removed_if
    from launcher.launch.session import start
    from launcher.launch.signal_handler import SignalHandler
    from launcher.report.write import write_report
    from launcher.runs.freezing import DEFAULT_LIMIT
    from launcher.sweeps.sweep_record import is_sweep

    if isinstance(run_dir, Path) and is_sweep(run_dir):
        changes = allow_code_change or health != "off" or code_limit
        given = overrides or accept or checkpoint or fall_back or machines.nodes.count
        only_ranks = not (given or machines.hosts)
        if changes or not only_ranks:
            raise UsageError(
                f"{run_dir} is the folder of a sweep, whose runs continue as they are: leave out "
                "everything but -n, or resume one of its runs by its own folder."
            )
        return resume_sweep(run_dir, nproc_per_node, output_mode(quiet=quiet, as_json=as_json))
    signals = SignalHandler()
    variables = machines.variables()
    nodes = machines.find()
    folder = fetch_run(run_dir, out, nodes, checkpoint=checkpoint, fall_back=fall_back)
    request = ResumeRequest(
        run_dir=folder,
        checkpoint=checkpoint,
        fall_back=fall_back,
        overrides=read_overrides(None, overrides),
        nproc_per_node=nproc_per_node,
        nodes=nodes,
        mirror=mirror,
        mirror_timeout=mirror_timeout,
        accept=accept,
        max_restarts=machines.nodes.restarts,
        health=health_check(health),
        allow_code_change=allow_code_change,
        freezes=freezes,
        code_limit=code_limit or DEFAULT_LIMIT,
        output_mode=output_mode(quiet=quiet, as_json=as_json),
        write_report=write_report,
    )
    with removed_if(LauncherError, run_dir, folder):
        prepared = prepare_resume(request, elsewhere=machines.hosts is not None)
    if prepared.finished:
        echo(f"{prepared.shown} has finished: {prepared.finished}.")
        return upload_rest(prepared)
    if machines.hosts is not None:
        return machines.start_on_hosts(machines.hosts, variables)
    with removed_if(StoreError, run_dir, folder):  # another process has just taken the URL
        return start(prepared, signals).exit_code
