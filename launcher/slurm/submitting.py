"""Check a prepared job with sbatch, and submit it."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from launcher.runs.files import write_atomic
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.slurm.batch_job import PreparedJob
from launcher.slurm.queue import check_with_sbatch, submit
from launcher.slurm.script import render


def check_script(prepared: PreparedJob) -> str:
    """Let `sbatch --test-only` check the script of a job; return what it printed.

    Raises:
        SlurmError: sbatch rejects the script.
    """
    if shutil.which("sbatch") is None:
        return "launcher: the script was not checked, because sbatch is not installed here"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "job.sbatch"
        write_atomic(path, render(prepared.batch))
        return check_with_sbatch(str(path))


def submit_job(prepared: PreparedJob, grid: Sequence[tuple[str, ...]]) -> tuple[str, RunDir]:
    """Make the run folder of a job and submit its script; leave nothing behind if that fails.

    Args:
        prepared: The job.
        grid: The settings of each run of an array; empty for a single run.

    Returns:
        The job id and the run folder, or the folder of the array.

    Raises:
        SlurmError: Slurm rejects the job.
        RunDirError: The folder exists or cannot be made.
    """
    folder = create_run_dir(prepared.folder, prepared.plans[0].recipe)
    try:
        prepared.code.copy_to(folder.path)
        path = folder.path / "job.sbatch"
        write_atomic(path, render(prepared.batch))
        prepared.save("", grid)  # the job may start before sbatch returns its id
        check_with_sbatch(str(path))
        job = submit(str(path))
    except BaseException:
        shutil.rmtree(folder.path)
        raise
    prepared.save(job, grid)
    return job, folder
