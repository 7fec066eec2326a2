"""The run folder, and its mirror, while this launcher owns them."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

from launcher.errors import CheckpointError, RunDirError
from launcher.launch.mirroring import Mirroring
from launcher.launch.prepare import PreparedRun, RunRequest
from launcher.launch.run_folder import open_run_folder
from launcher.recipe.resolve import Reference
from launcher.regular_file import read_regular
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.files import write_atomic
from launcher.runs.freezing import CodeSnapshot, freeze, place_of
from launcher.runs.ownership import own_run_dir
from launcher.runs.run_record import CodeRecord, replace_code, write_resumption
from launcher.runs.rundir import RunDir

_MAX_RECORD_BYTES = 1 << 24
"""Largest run.yaml that is restored if the ranks refuse to resume."""


class OwnedFolder:
    """The run folder, which the launcher of the first node makes, takes or takes over.

    Args:
        ownership: Ends the ownership when it is closed.
        mirroring: The mirror of the run.
    """

    def __init__(self, ownership: ExitStack, mirroring: Mirroring) -> None:
        self._ownership, self.mirroring = ownership, mirroring
        self._record: bytes | None = None
        """run.yaml before this launcher changed it."""

        self._is_owner = False

    def make(self, prepared: PreparedRun) -> RunDir:
        """Make the folder of a run, or take the one of a run to resume; freeze the project.

        Args:
            prepared: The run.

        Raises:
            StoreError: The mirror cannot be used.
            RunDirError: The folder or the copy cannot be made, or another process owns it.
            CheckpointError: The chosen checkpoint has been removed since it was chosen.
        """
        request = prepared.request
        self.mirroring.open(_folder_to_resume(prepared))
        if isinstance(request, RunRequest):
            if request.continues and request.out is not None:
                self._record = _content_of(request.out / "run.yaml")
            made = open_run_folder(
                request.out,
                prepared.plan.recipe,
                prepared.description,
                self._ownership,
                continues=request.continues,
                with_ranks=True,
            )
        else:
            assert prepared.run_dir is not None
            self._record = _content_of(prepared.run_dir.run_yaml)
            made = _take_to_resume(prepared.run_dir, prepared, self._ownership)
        self._is_owner = True
        if prepared.snapshot is not None:
            try:
                _freeze(prepared.reference, prepared.snapshot, made)
            except RunDirError:
                self.restore_record(made)  # a resumption that is refused leaves the run as it was
                raise
        return made

    def take_over(self, run_dir: RunDir) -> bool:
        """Own the folder, which another launcher has made; return whether it is newly owned.

        Raises:
            RunDirError: That launcher owns the folder after all.
            StoreError: The mirror cannot be used.
        """
        if self._is_owner:
            return False
        own = own_run_dir(run_dir, with_ranks=True, takes_over=True)
        self._ownership.enter_context(own)
        self._is_owner = True
        self.mirroring.open(run_dir, takes_over=True)
        return True

    def restore_record(self, run_dir: RunDir) -> None:
        """Write run.yaml as it was, if there was one.

        Raises:
            RunDirError: It cannot be written.
        """
        if self._record is not None:
            write_atomic(run_dir.run_yaml, self._record)


def _folder_to_resume(prepared: PreparedRun) -> RunDir | None:
    """Return the folder of the run that a request resumes; None for a new run."""
    request = prepared.request
    if not isinstance(request, RunRequest):
        return prepared.run_dir
    return RunDir(request.out.resolve()) if request.continues and request.out else None


def _freeze(reference: Reference, snapshot: CodeSnapshot, run_dir: RunDir) -> None:
    """Copy the project of a recipe into the run folder, and say so in run.yaml.

    Raises:
        RunDirError: The copy cannot be written.
    """
    code = freeze(snapshot, run_dir.path)
    record = CodeRecord(project=str(code.project), files=snapshot.digests, copy=str(code.copy))
    replace_code(run_dir, place_of(reference, code), record)


def _content_of(path: Path) -> bytes | None:
    try:
        return read_regular(path, _MAX_RECORD_BYTES)
    except OSError:
        return None


def _take_to_resume(run_dir: RunDir, prepared: PreparedRun, ownership: ExitStack) -> RunDir:
    """Own the folder of a run to resume, and describe the resumption in it.

    Raises:
        CheckpointError: The chosen checkpoint has been removed since it was chosen.
    """
    ownership.enter_context(own_run_dir(run_dir, with_ranks=True))
    assert prepared.resume_from is not None
    step = prepared.resume_from.step
    if not any(checkpoint.step == step for checkpoint in list_checkpoints(run_dir)):
        raise CheckpointError(
            f"{run_dir.shown} no longer has the checkpoint of step {step}: another process resumed "
            "the run while this one started. Repeat the command."
        )
    write_resumption(run_dir, prepared.description)
    return run_dir
