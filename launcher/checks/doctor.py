"""The ranks of `launcher doctor`: they train nothing and examine themselves and each other."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec

from launcher.checks.node_checks import check_node
from launcher.console.failure import failure_with_log
from launcher.engine.probes.diagnostics_recipe import diagnostics_recipe
from launcher.environment.machine import Machine
from launcher.environment.nodes import Nodes
from launcher.environment.world import World
from launcher.findings import Finding, RankDiagnostics
from launcher.json_file import read_json
from launcher.launch.launcher import launch
from launcher.launch.multi_node import joined
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.planning.planner import make_plan
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job
from launcher.runs.private_folder import private_folder
from launcher.runs.rundir import RunDir, create_run_dir

if TYPE_CHECKING:
    from launcher.launch.multi_node import NodeGroup


def plan_diagnostics(
    machine: Machine,
    *,
    device: Literal["cuda", "cpu"] | None = None,
    nodes: int = 1,
    nproc_per_node: int | None = None,
) -> Plan:
    """Return the plan of the ranks that `launcher doctor` starts.

    Args:
        machine: The machine to plan for.
        device: Device of the ranks; None chooses GPUs if the machine has any.
        nodes: Number of nodes.
        nproc_per_node: Number of ranks on each node; None starts one for each GPU of the machine,
            or two if it has none.

    Raises:
        PlanError: The machine has too few GPUs for the ranks.
    """
    ranks = nodes * (nproc_per_node or machine.num_gpus or 2)
    return make_plan(
        diagnostics_recipe(ranks, device), machine, nodes=nodes, nproc_per_node=nproc_per_node
    )


def diagnose(
    plan: Plan, signals: SignalHandler, *, watch: Callable[[RunDir], object] | None = None
) -> list[RankDiagnostics]:
    """Start the ranks on this machine and return the diagnostics of each, by rank.

    Args:
        plan: The plan of the ranks.
        signals: Handles signals meanwhile.
        watch: Called many times a second meanwhile.

    Raises:
        RunFailedError: A rank failed; the message quotes its log.
    """
    return _diagnose(plan, signals, watch=watch)


def _diagnose(
    plan: Plan,
    signals: SignalHandler,
    *,
    rendezvous: NodeGroup | None = None,
    watch: Callable[[RunDir], object] | None = None,
) -> list[RankDiagnostics]:
    """Start the ranks of this node; return the diagnostics of all ranks, nothing if not first."""
    from launcher.engine.worker import agent_diagnostics

    with private_folder() as folder:
        run_dir = create_run_dir(folder / "run", plan.recipe)
        job = Job(
            recipe="",
            overrides=(),
            plan=plan,
            run_dir=run_dir,
            launcher_pid=os.getpid(),
            saves=False,
            output_mode="quiet",
        )
        try:
            launch(job, agent_diagnostics, signals=signals, rendezvous=rendezvous, watch=watch)
        except RunFailedError as error:
            text = failure_with_log(error.failure, run_dir).removeprefix("launcher: ")
            raise RunFailedError(text, error.failure) from None
        if rendezvous is not None and rendezvous.index > 0:
            return []
        return read_json(run_dir.diagnostics, list[RankDiagnostics])


def diagnose_nodes(
    plan: Plan, nodes: Nodes, out: Path, signals: SignalHandler
) -> list[RankDiagnostics] | None:
    """Examine this node and its ranks together with the other nodes, each of which calls this.

    Args:
        plan: The plan of the ranks on all nodes.
        nodes: The nodes, and where they meet.
        out: Folder for run folders, which each node examines.
        signals: Handles signals meanwhile.

    Returns:
        The diagnostics of all ranks on the first node, those of the first rank of each node with
        the findings about it; None on the others.

    Raises:
        RunFailedError: A rank of this node failed; the message quotes its log.
        PeerError: Another node failed.
        WorldError: Some nodes do not arrive in time, or would examine something else.
    """
    findings = list(check_node(plan, out))
    with joined(nodes, plan, signals) as rendezvous:
        assert rendezvous is not None
        key = "findings{}".format
        rendezvous.store.set(key(rendezvous.index), msgspec.json.encode(findings).decode())
        reports = _diagnose(plan, signals, rendezvous=rendezvous)
        if rendezvous.index > 0:
            rendezvous.leave(0)
            return None
        for index in range(plan.nodes):
            rank = index * plan.nproc_per_node
            found = msgspec.json.decode(rendezvous.store.get(key(index)), type=tuple[Finding, ...])
            reports[rank] = replace(reports[rank], node_findings=found)
        rendezvous.leave(0)
    return reports


def diagnose_here(plan: Plan, world: World, out: Path) -> list[RankDiagnostics] | None:
    """Examine the rank that another launcher, such as torchrun, started this process as.

    Args:
        plan: The plan of all ranks.
        world: The place of this process among them.
        out: Folder for run folders; the first rank of each node checks it with the node.

    Returns:
        The diagnostics of all ranks on rank 0, None on the others.
    """
    node_findings: tuple[Finding, ...] = ()
    if world.local_rank == 0:
        node_findings = tuple(check_node(plan, out, launched_by=os.getppid()))
    from launcher.engine.external import external_diagnostics

    return external_diagnostics(plan, world, node_findings)
