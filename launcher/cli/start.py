"""Starting the ranks of a run that is planned, for the commands that do."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.cli import echo_if_possible

if TYPE_CHECKING:
    from launcher.environment.nodes import Nodes
    from launcher.launch.launcher import SignalHandler
    from launcher.launch.multi_node import Rendezvous
    from launcher.planning.plan import Plan
    from launcher.recipe.overrides import Override
    from launcher.recipe.resolve import Reference
    from launcher.runs.job import OutputMode, ResumeFrom
    from launcher.runs.run_record import RunRecord
    from launcher.runs.rundir import RunDir


def find_machines(
    hosts: tuple[str, ...] | None,
    count: int | None,
    rendezvous: str | None,
    join_timeout: float | None,
) -> Nodes | None:
    """Return the machines of the run, reached from here or not; None for this one alone.

    Raises:
        UsageError: What is asked for does not go together.
        WorldError: Slurm has started something else than one launcher on each node.
    """
    from launcher.environment.nodes import find_nodes, nodes_of_hosts
    from launcher.errors import UsageError

    if hosts is None:
        return find_nodes(count, rendezvous, join_timeout)
    if count not in (None, len(hosts)):
        raise UsageError(f"--nodes {count} was asked for, and --hosts names {len(hosts)}.")
    return nodes_of_hosts(hosts, rendezvous)


def start_on_hosts(
    hosts: tuple[str, ...], folder: Path, rendezvous: str | None, ssh: str | None
) -> int:
    """Have the command that was typed in `folder` run on each of `hosts`; return the exit code."""
    from launcher.launch.ssh import run_on_hosts

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


def make_run_dir(
    out: Path | None,
    recipe: str,
    description: RunRecord,
    held: ExitStack,
    *,
    goes_on: bool = False,
    with_ranks: bool = False,
) -> RunDir:
    """Make the folder of a run, or take the one to go on in, and own it before it is changed.

    Args:
        out: The folder; None makes one below runs/.
        recipe: The recipe's name.
        description: For run.yaml.
        held: Ends the ownership.
        goes_on: Whether `out` may have been begun, or made by `launcher submit`.
        with_ranks: As of `launcher.runs.ownership.own`.

    Raises:
        RunDirError: Another process owns the folder, or it is taken or cannot be made.
    """
    from launcher.runs.ownership import check_unowned, own
    from launcher.runs.run_record import write_resumption, write_run
    from launcher.runs.rundir import RunDir, create_run_dir

    begun = out is not None and RunDir(out.resolve())
    if begun and goes_on and (begun.run_yaml.is_file() or begun.submission.is_file()):
        held.enter_context(own(begun, with_ranks=with_ranks))
        if begun.run_yaml.is_file():
            write_resumption(begun, description)
        else:
            write_run(begun, description)
        return begun
    if out is not None:
        check_unowned(out)
    made = create_run_dir(out, recipe)
    held.enter_context(own(made, with_ranks=with_ranks))
    write_run(made, description)
    return made


def start(
    reference: Reference,
    overrides: tuple[Override, ...],
    plan: Plan,
    run_dir: RunDir,
    *,
    signals: SignalHandler,
    output_mode: OutputMode,
    restarts: int,
    rendezvous: Rendezvous | None = None,
    begin: ResumeFrom | None = None,
    changes: Iterable[str] = (),
    restores: str | None = None,
) -> int:
    """Show the plan, and what it changes of the run before; train; return the exit code.

    Args:
        reference: The recipe.
        overrides: What it was built with.
        plan: How it is trained.
        run_dir: Where.
        signals: Handles signals.
        output_mode: What is printed.
        restores: The run.yaml that the folder gets back where the ranks refuse to go on with a run.
        restarts: How often a failed run begins again.
        rendezvous: With the other machines; None is alone.
        begin: From which checkpoint to go on.
        changes: What differs from the run before, in words.
    """
    from launcher.console.explain import changed_lines, explain
    from launcher.console.progress import json_line
    from launcher.errors import EXIT_USAGE
    from launcher.launch.launcher import launch
    from launcher.report.write import write_report
    from launcher.runs.job import Job
    from launcher.runs.rundir import write_atomic

    if rendezvous is None or rendezvous.index == 0:
        if output_mode == "progress":
            lines = [explain(plan, recipe=reference.shown), *changed_lines(changes)]
            echo_if_possible("\n".join(lines))
        elif output_mode == "json":
            planned = {"event": "planned", "run_dir": str(run_dir.path)}
            echo_if_possible(json_line(planned | {"plan": plan.to_dict()}))
    job = Job(
        recipe=reference.location,
        overrides=overrides,
        plan=plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        start=begin,
        output_mode=output_mode,
        restarts=restarts,
        write_report=write_report,
    )
    code = launch(job, signals=signals, rendezvous=rendezvous)
    if code == EXIT_USAGE and restores is not None:
        write_atomic(run_dir.run_yaml, restores)
    return code if rendezvous is None else rendezvous.leave(code)
