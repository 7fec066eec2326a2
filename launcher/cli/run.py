"""`launcher run`: plan a run, start its ranks and train."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

import click

from launcher.cli.arguments import (
    accept_option,
    code_change_option,
    config_option,
    freezing_options,
    health_option,
    mirror_options,
    nproc_option,
    output_mode,
    output_options,
    overrides_argument,
    read_overrides,
    recipe_argument,
)
from launcher.cli.machines import MachineOptions
from launcher.cli.node_options import run_nodes_options
from launcher.cli.settings_command import SettingsCommand
from launcher.cli.values import FolderOrURL
from launcher.errors import UsageError


@click.command(cls=SettingsCommand, short_help="Train a recipe.")
@recipe_argument
@overrides_argument
@nproc_option
@run_nodes_options
@config_option
@click.option(
    "--out",
    type=FolderOrURL(),
    metavar="DIR|URL",
    help="Run folder to make. Default: runs/<recipe>-<time>. A URL makes the default folder and is "
    "its --mirror.",
)
@mirror_options
@click.option(
    "--continue",
    "continues",
    is_flag=True,
    help="If --out or --mirror holds a run, resume it from its newest undamaged checkpoint.",
)
@accept_option
@code_change_option
@click.option(
    "--code",
    "code_folder",
    type=click.Path(path_type=Path),
    metavar="DIR",
    hidden=True,
    help="Import the recipe from this copy of its project, as jobs do.",
)
@freezing_options
@health_option
@click.option(
    "--debug",
    "debugs",
    is_flag=True,
    help="Train in this process alone, so that breakpoint() and pdb work: without workers and "
    "torch.compile, with anomaly detection, and with the shapes of tensors in errors.",
)
@click.option(
    "--pdb", "opens_pdb", is_flag=True, help="Like --debug, and open pdb where an error was raised."
)
@click.option(
    "--warm/--no-warm",
    "warm",
    default=None,
    help="Fork the run from a process that has imported torch before, and that stays for the next "
    "run. Default: as LAUNCHER_WARM=1 says.",
)
@output_options
def command(
    recipe: str,
    overrides: tuple[str, ...],
    nproc_per_node: int | None,
    config: Path | None,
    out: Path | str | None,
    mirror: str | None,
    mirror_timeout: float,
    accept: tuple[str, ...],
    code_folder: Path | None,
    code_limit: int | None,
    health: Literal["off", "quick", "full"],
    *,
    machines: MachineOptions,
    allow_code_change: bool,
    freezes: bool,
    debugs: bool,
    opens_pdb: bool,
    continues: bool,
    warm: bool | None,  # noqa: ARG001  # `launcher.cli.main` has started this process accordingly
    quiet: bool,
    as_json: bool,
) -> int:
    """Train RECIPE on the GPUs of this machine, or on CPU ranks if it has none.

    To train on several machines, run this command on each of them with --nodes and --rendezvous,
    run it once with --hosts, or start it with srun, one task on each node.

    \b
    launcher run digits
    launcher run recipes/digits.py -n 4 lr=0.2 epochs=3
    launcher run digits --config mine.yaml --out runs/mine
    launcher run digits --nodes 2 --rendezvous node1 --out /shared/mine
    launcher run digits --hosts node1,node2 --out /shared/mine
    launcher run digits --out s3://bucket/runs/mine
    launcher run digits --debug
    """
    from launcher.checks.health_gate import health_check
    from launcher.launch.code_choice import code_of_continued
    from launcher.launch.debug_session import debug
    from launcher.launch.prepare import RunRequest, prepare_run
    from launcher.launch.remote_run import place_run
    from launcher.launch.session import start
    from launcher.launch.signal_handler import SignalHandler
    from launcher.recipe.resolve import resolve
    from launcher.report.write import write_report
    from launcher.runs.freezing import DEFAULT_LIMIT, open_frozen

    if debugs or opens_pdb:
        given = {
            "--nproc-per-node": nproc_per_node not in (None, 1),
            "--nodes": machines.nodes.count is not None,
            "--rendezvous": machines.nodes.rendezvous is not None,
            "--hosts": machines.hosts is not None,
            "--continue": continues,
            "--max-restarts": machines.nodes.restarts > 0,
            "--spares": machines.nodes.spares > 0,
            "--health": health != "off",
            "--mirror": mirror is not None or isinstance(out, str),
        }
        _check_debuggable([name for name, is_given in given.items() if is_given])
        request = RunRequest(
            reference=resolve(recipe),
            overrides=read_overrides(config, overrides),
            out=None if out is None else Path(out),
            output_mode=output_mode(quiet=quiet, as_json=as_json),
            write_report=write_report,
        )
        return debug(request, post_mortem=opens_pdb)
    signals = SignalHandler()
    variables = machines.variables()
    if continues and out is None:
        raise UsageError("--continue resumes the run in --out: add --out DIR.")
    if accept and not continues:
        raise UsageError(f"--accept {accept[0]} applies to a resumed run: add --continue.")
    nodes = machines.find()
    folder, mirror = place_run(out, mirror, nodes, continues=continues and not machines.hosts)
    code = None if code_folder is None else open_frozen(code_folder)
    if code is None and continues and folder is not None and not allow_code_change:
        code = code_of_continued(folder)
    request = RunRequest(
        reference=resolve(recipe, code),
        overrides=read_overrides(config, overrides),
        nproc_per_node=nproc_per_node,
        nodes=nodes,
        out=folder,
        mirror=mirror,
        mirror_timeout=mirror_timeout,
        continues=continues,
        accept=accept,
        max_restarts=machines.nodes.restarts,
        health=health_check(health),
        freezes=freezes,
        code_limit=code_limit or DEFAULT_LIMIT,
        output_mode=output_mode(quiet=quiet, as_json=as_json),
        write_report=write_report,
    )
    prepared = prepare_run(request, elsewhere=machines.hosts is not None)
    if machines.hosts is not None:
        return machines.start_on_hosts(machines.hosts, variables)
    return start(prepared, signals).exit_code


def _check_debuggable(options: Sequence[str]) -> None:
    """Refuse options that need several processes.

    Raises:
        UsageError: There is one.
    """
    if options:
        raise UsageError(
            f"--debug trains in one process, and {options[0]} needs others: leave one of them out. "
            "In a run of several ranks, breakpoint() stops the rank that calls it."
        )
