"""`launcher doctor`: find what could slow down or stop a run before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import click

from launcher.cli.arguments import nproc_option
from launcher.cli.machines import MachineOptions
from launcher.cli.node_options import nodes_options
from launcher.console.echo import echo
from launcher.errors import EXIT_FAILED

if TYPE_CHECKING:
    from launcher.environment.nodes import Nodes
    from launcher.findings import Finding, RankDiagnostics
    from launcher.planning.plan import Plan


@click.command(short_help="Find what could slow down or stop a run.")
@nproc_option
@nodes_options
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
    nproc_per_node: int | None,
    device: Literal["cuda", "cpu"] | None,
    out: Path,
    *,
    machines: MachineOptions,
    as_json: bool,
) -> int:
    """Find what could slow down or stop a run, on this machine and between its ranks.

    It checks cores, memory, /dev/shm, disk and driver of the node and the health of its GPUs and
    InfiniBand adapters, then versions, devices, arithmetic and communication of the ranks. The exit
    code is 1 if a run would fail. To compare several nodes, name them as for `launcher run`, or
    start it as ranks with srun or torchrun.

    \b
    launcher doctor
    launcher doctor -n 4 --out /scratch/runs
    launcher doctor --hosts node1,node2
    launcher doctor --nodes 2 --rendezvous node1
    torchrun --nproc-per-node 2 --no-python launcher doctor
    """
    from launcher.environment.nodes import is_over_ssh
    from launcher.findings import worst

    variables = machines.variables()
    request, nodes = machines.nodes, None
    if machines.hosts or request.count or request.rendezvous or is_over_ssh():
        nodes = machines.find()
    if machines.hosts is not None:
        return machines.start_on_hosts(machines.hosts, variables)
    shown = _Shown(as_json=as_json, findings=[])
    reports = _examine(nproc_per_node, nodes, device, out, shown)
    if reports is None:
        return 0
    shown.end(reports)
    return EXIT_FAILED if worst(shown.findings) == "failure" else 0


@dataclass(frozen=True, kw_only=True)
class _Shown:
    """What the command has found, and prints as it goes."""

    as_json: bool
    findings: list[Finding]

    def add(self, finding: Finding) -> None:
        from launcher.console.findings_table import finding_lines

        self.findings.append(finding)
        if not self.as_json:
            for line in finding_lines(finding):
                echo(line)

    def end(self, reports: Sequence[RankDiagnostics]) -> None:
        from launcher.console.findings_table import summary
        from launcher.json_file import encode_json

        if self.as_json:
            measured = [asdict(report) for report in reports]
            values = {"findings": list(map(asdict, self.findings)), "ranks": measured}
            echo(encode_json(values))
        else:
            echo(summary(self.findings))


def _examine(
    nproc_per_node: int | None,
    machines: Nodes | None,
    device: Literal["cuda", "cpu"] | None,
    out: Path,
    shown: _Shown,
) -> list[RankDiagnostics] | None:
    """Examine the nodes and their ranks; return the diagnostics, or None where others show them."""
    from launcher.checks.doctor import diagnose_here, plan_diagnostics
    from launcher.checks.group_checks import check_group
    from launcher.environment.machine import read_machine
    from launcher.environment.world import World, find_world, machine_of

    world = World() if machines is not None else find_world()
    alone = world.world_size == 1
    plan = plan_diagnostics(
        machine_of(read_machine(), world),
        device=device,
        nodes=world.nodes if machines is None else machines.count,
        nproc_per_node=nproc_per_node if alone else world.local_world_size,
    )
    reports = _start_ranks(plan, machines, out, shown) if alone else diagnose_here(plan, world, out)
    for finding in check_group(reports, plan) if reports else ():
        shown.add(finding)
    return reports


def _start_ranks(
    plan: Plan, machines: Nodes | None, out: Path, shown: _Shown
) -> list[RankDiagnostics] | None:
    """Start ranks that examine themselves; what fails is a finding."""
    from launcher.checks.doctor import diagnose, diagnose_nodes
    from launcher.checks.node_checks import check_node
    from launcher.findings import failure
    from launcher.launch.signal_handler import SignalHandler
    from launcher.runs.failure_record import RunFailedError

    try:
        if machines is not None:
            return diagnose_nodes(plan, machines, out, SignalHandler(saves=False))
        for finding in check_node(plan, out):
            shown.add(finding)
        return diagnose(plan, SignalHandler(saves=False))
    except RunFailedError as error:
        echo(f"launcher: {error}", err=True)
        shown.add(
            failure(
                "ranks",
                "the diagnostic ranks failed: the error is printed above",
                "fix that error first: a run would fail in the same way",
            )
        )
        return []
