"""A recipe that one short process examines, for commands that print what it finds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from launcher.console.failure import failure_with_log
from launcher.launch.launcher import launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import Reference
from launcher.runs.failure_record import RunFailedError
from launcher.runs.job import Job
from launcher.runs.private_folder import private_folder
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir, create_run_dir


@contextlib.contextmanager
def examined(
    reference: Reference,
    overrides: Sequence[Override],
    description: RunRecord,
    process_plan: Plan,
    function: Callable[[Job], None],
    signals: SignalHandler,
) -> Iterator[RunDir]:
    """Call `function` in one process, and yield the folder of what it wrote in this context.

    Args:
        reference: The recipe.
        overrides: Settings that were applied to it.
        description: The content of run.yaml of the intended run.
        process_plan: The plan of the process.
        function: What the process calls, from `launcher.engine.worker`.
        signals: Handler of the signals that stop the process.

    Raises:
        RunFailedError: The recipe raised an exception.
    """
    with private_folder() as folder:
        run_dir = create_run_dir(folder / "examination", process_plan.recipe)
        write_run(run_dir, description)
        job = Job(
            recipe=reference.location,
            overrides=tuple(overrides),
            plan=process_plan,
            run_dir=run_dir,
            launcher_pid=os.getpid(),
            saves=False,
        )
        try:
            launch(job, function, signals=signals)
        except RunFailedError as error:
            text = failure_with_log(error.failure, run_dir).removeprefix("launcher: ")
            raise RunFailedError(text, error.failure) from None
        yield run_dir
