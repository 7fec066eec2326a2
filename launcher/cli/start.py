"""Starting the ranks of a run that is planned, for the commands that do."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from launcher.cli import drop_output
from launcher.errors import EndedError, LauncherError, PeerError, RunDirError, UsageError

if TYPE_CHECKING:
    from launcher.engine.meeting import Meeting
    from launcher.job import Start
    from launcher.launch import Stops
    from launcher.nodes import Nodes
    from launcher.overrides import Override
    from launcher.plan import Plan
    from launcher.resolve import Reference
    from launcher.rundir import RunDir


@contextlib.contextmanager
def met(nodes: Nodes | None, plan: Plan) -> Iterator[Meeting | None]:
    """Meet the launchers on the other machines of a run; have them know of an error.

    One speaks of it: the one that has it, or for all that Slurm has started the first.
    """
    from launcher.launch import meet

    meeting = None
    try:
        meeting = meet(nodes, plan)
        yield meeting
    except PeerError as error:
        if meeting is not None:
            error.exit_code = meeting.part(error.exit_code)
        if nodes is not None and nodes.index:
            raise EndedError(error.exit_code) from None
        raise
    except LauncherError as error:
        if meeting is not None:
            meeting.report(error.exit_code)
            meeting.part(error.exit_code)
        raise


def check_restarts(nodes: Nodes | None, restarts: int) -> None:
    """Refuse to start ranks again where those of other machines would have to as well.

    Raises:
        UsageError: That is asked for.
    """
    if nodes is not None and restarts:
        raise UsageError(
            f"--max-restarts {restarts} starts the ranks of one machine again, and this run is on "
            f"{nodes.count}. Start it again with --continue; `launcher submit` has Slurm do that."
        )


def make_once(meeting: Meeting | None, make: Callable[[], RunDir]) -> RunDir:
    """Make a run folder, on the first machine, or take the one that was made there.

    Raises:
        RunDirError: It cannot be made, or is not seen here.
    """
    from launcher.rundir import RunDir

    if meeting is None:
        return make()
    run_dir = RunDir(Path(meeting.share(lambda: str(make().path))))
    if not run_dir.run_yaml.is_file():
        raise RunDirError(
            f"The run folder {run_dir.path} of {meeting.names[0]} is not on this machine, "
            f"{meeting.names[meeting.index]}. Give an --out on a file system that all of them have."
        )
    return run_dir


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
