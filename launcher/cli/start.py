"""Starting the ranks of a run that is planned, for the commands that do."""

from __future__ import annotations

import os
from collections.abc import Iterable
from typing import TYPE_CHECKING

import click

from launcher.cli import drop_output

if TYPE_CHECKING:
    from launcher.job import Start
    from launcher.launch import Stops
    from launcher.multinode import Meeting
    from launcher.overrides import Override
    from launcher.plan import Plan
    from launcher.resolve import Reference
    from launcher.rundir import RunDir


def start(
    reference: Reference,
    overrides: tuple[Override, ...],
    plan: Plan,
    run_dir: RunDir,
    *,
    stops: Stops,
    restarts: int,
    meeting: Meeting | None = None,
    begin: Start | None = None,
    changes: Iterable[str] = (),
) -> int:
    """Show the plan, and what it changes of the run before; train; return the exit code."""
    from launcher.job import Job
    from launcher.launch import launch
    from launcher.report.explain import explain

    if meeting is None or meeting.index == 0:
        try:
            click.echo(explain(plan, recipe=reference.shown))
            for change in changes:
                click.echo(f"  changed     {change}")
        except BrokenPipeError:  # no reason not to train
            drop_output()
    job = Job(
        recipe=reference.location,
        overrides=overrides,
        plan=plan,
        run_dir=run_dir,
        launcher_pid=os.getpid(),
        start=begin,
        restarts=restarts,
    )
    code = launch(job, stops=stops, meeting=meeting)
    return code if meeting is None else meeting.part(code)
