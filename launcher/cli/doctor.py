"""`launcher doctor`: find what could slow down or stop a run before it starts."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Literal

import click

from launcher.cli.arguments import nproc_option
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED


@click.command(short_help="Find what could slow down or stop a run.")
@nproc_option
@click.option(
    "--device",
    type=click.Choice(["cuda", "cpu"]),
    help="Device of the ranks. Default: GPUs if there are any.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    default=Path("runs"),
    show_default=True,
    metavar="DIR",
    help="Where run folders would be made.",
)
@click.option("--json", "as_json", is_flag=True, help="Print findings and measurements as JSON.")
def command(
    nproc_per_node: int | None, device: Literal["cuda", "cpu"] | None, out: Path, *, as_json: bool
) -> int:
    """Find what could slow down or stop a run, on this machine and between its ranks.

    It checks cores, memory, /dev/shm, disk and driver of the node and the health of its GPUs and
    InfiniBand adapters, then versions, devices, arithmetic and communication of the ranks. The exit
    code is 1 if a run would fail. Start it as ranks, with srun or torchrun, to check several nodes.

    \b
    launcher doctor
    launcher doctor -n 4 --out /scratch/runs
    torchrun --nproc-per-node 2 --no-python launcher doctor
    """
    from launcher.checks.doctor import diagnose, diagnose_here, plan_diagnostics
    from launcher.checks.group_checks import check_group
    from launcher.checks.node_checks import check_node
    from launcher.console.findings_table import finding_lines, summary
    from launcher.environment.machine import read_machine
    from launcher.environment.world import find_world, machine_of
    from launcher.findings import Finding, RankDiagnostics, worst
    from launcher.json_file import encode_json
    from launcher.launch.signal_handler import SignalHandler
    from launcher.runs.failure_record import RunFailedError

    world = find_world()
    alone = world.world_size == 1
    plan = plan_diagnostics(
        machine_of(read_machine(), world),
        device=device,
        nodes=world.nodes,
        nproc_per_node=nproc_per_node if alone else world.local_world_size,
    )
    findings: list[Finding] = []
    reports: list[RankDiagnostics] = []

    def report(finding: Finding) -> None:
        findings.append(finding)
        if not as_json:
            for line in finding_lines(finding):
                echo(line)

    if alone:
        for finding in check_node(plan, out):
            report(finding)
        try:
            reports = diagnose(plan, SignalHandler(saves=False))
        except RunFailedError as error:
            echo(f"launcher: {error}", err=True)
            report(
                Finding(
                    check="ranks",
                    level="failure",
                    found="the diagnostic ranks failed: the error is printed above",
                    remedy="fix that error first: a run would fail in the same way",
                )
            )
    else:
        on_rank_0 = diagnose_here(plan, world, out)
        if on_rank_0 is None:
            return 0
        reports = on_rank_0
    for finding in check_group(reports, plan) if reports else ():
        report(finding)
    if as_json:
        measured = [asdict(rank_report) for rank_report in reports]
        echo(encode_json({"findings": list(map(asdict, findings)), "ranks": measured}))
    else:
        echo(summary(findings))
    return EXIT_FAILED if worst(findings) == "failure" else 0
