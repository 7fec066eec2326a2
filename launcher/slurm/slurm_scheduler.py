"""Slurm as a scheduler of `launcher submit`."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from launcher.runs.files import write_atomic
from launcher.runs.rundir import RunDir
from launcher.runs.status import RunState
from launcher.schedulers.follow import copy_log_file
from launcher.schedulers.prepared import Prepared, submit_prepared
from launcher.schedulers.request import SubmitRequest
from launcher.schedulers.scheduler import Scheduler
from launcher.schedulers.submission import SubmittedRun
from launcher.slurm.batch_job import SCRIPT, prepare
from launcher.slurm.job_status import run_states
from launcher.slurm.queue import cancel, check_with_sbatch, submit
from launcher.slurm.site import find_site


class SlurmScheduler:
    """Submits batch scripts with sbatch."""

    def prepare(self, request: SubmitRequest, cluster: str | None, out: Path | None) -> Prepared:
        return prepare(request, find_site(cluster), out)

    def check(self, prepared: Prepared) -> str:
        """Let `sbatch --test-only` check the script of a job; return what it printed.

        Raises:
            SlurmError: sbatch rejects the script.
        """
        if shutil.which("sbatch") is None:
            return "launcher: the script was not checked, because sbatch is not installed here"
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / SCRIPT
            write_atomic(path, prepared.files[SCRIPT])
            return check_with_sbatch(str(path))

    def submit(self, prepared: Prepared) -> tuple[str, RunDir]:
        return submit_prepared(prepared, _send)

    def states(self, runs: Sequence[SubmittedRun]) -> list[RunState]:
        return run_states(runs)

    def copy_log(
        self, run: SubmittedRun, write: Callable[[bytes], object], *, follows: bool
    ) -> None:
        copy_log_file(Path(run.submission.log), run.run_dir, write, follows=follows)

    def cancel(self, runs: Sequence[SubmittedRun]) -> None:
        cancel([run.submission.job for run in runs])


def _send(folder: Path) -> str:
    """Check and submit the script in a run folder; return the job id.

    Raises:
        SlurmError: sbatch rejects the script.
    """
    path = str(folder / SCRIPT)
    check_with_sbatch(path)
    return submit(path)


SCHEDULER: Scheduler = SlurmScheduler()
