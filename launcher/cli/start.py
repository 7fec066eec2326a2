"""Starting the ranks of a run that is planned, for the commands that do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli import echo_if_possible

if TYPE_CHECKING:
    from launcher.job import Shows, Start
    from launcher.launch import Stops
    from launcher.multinode import Meeting
    from launcher.nodes import Nodes
    from launcher.overrides import Override
    from launcher.plan import Plan
    from launcher.resolve import Reference
    from launcher.rundir import RunDir


def find_machines(
    hosts: tuple[str, ...] | None,
    count: int | None,
    rendezvous: str | None,
    patience: float | None,
) -> Nodes | None:
    """Return the machines of the run, reached from here or not; None for this one alone.

    Raises:
        UsageError: What is asked for does not go together.
        WorldError: Slurm has started something else than one launcher on each node.
    """
    from launcher.errors import UsageError
    from launcher.nodes import find_nodes, nodes_of_hosts

    if hosts is None:
        return find_nodes(count, rendezvous, patience)
    if count not in (None, len(hosts)):
        raise UsageError(f"--nodes {count} was asked for, and --hosts names {len(hosts)}.")
    return nodes_of_hosts(hosts, rendezvous)


def start_on_hosts(
    hosts: tuple[str, ...], folder: Path, rendezvous: str | None, ssh: str | None
) -> int:
    """Have the command that was typed in `folder` run on each of `hosts`; return the exit code."""
    from launcher.hosts import run_on_hosts

    arguments = without(sys.argv[1:], ("--hosts", "--ssh", "--nodes", "--rendezvous"))
    return run_on_hosts(hosts, arguments, folder, rendezvous=rendezvous, ssh=ssh)


def without(arguments: Sequence[str], options: Sequence[str]) -> list[str]:
    """Return command-line arguments without some options and their values."""
    kept = []
    rest = iter(arguments)
    for each in rest:
        if each in options:
            next(rest, None)
        elif each.partition("=")[0] not in options:
            kept.append(each)
    return kept


def start(
    reference: Reference,
    overrides: tuple[Override, ...],
    plan: Plan,
    run_dir: RunDir,
    *,
    stops: Stops,
    shows: Shows,
    restarts: int,
    meeting: Meeting | None = None,
    begin: Start | None = None,
    changes: Iterable[str] = (),
) -> int:
    """Show the plan, and what it changes of the run before; train; return the exit code."""
    from launcher.job import Job
    from launcher.launch import launch
    from launcher.report.explain import explain
    from launcher.report.progress import json_line

    if meeting is None or meeting.index == 0:
        if shows == "progress":
            lines = [explain(plan, recipe=reference.shown)]
            echo_if_possible("\n".join(lines + [f"  changed     {each}" for each in changes]))
        elif shows == "json":
            planned = {"event": "planned", "run_dir": str(run_dir.path)}
            echo_if_possible(json_line(planned | {"plan": plan.to_dict()}))
    job = Job(
        recipe=reference.location,
        overrides=overrides,
        plan=plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        start=begin,
        shows=shows,
        restarts=restarts,
    )
    code = launch(job, stops=stops, meeting=meeting)
    return code if meeting is None else meeting.part(code)
