"""failure.json: which rank of a run failed first, and how.

Ranks, the watchdog and the launcher write a `Failure`; everything that shows a failed run reads it.
A rank that cannot write to the run folder leaves its failure in a file of the launcher's own.
"""

from __future__ import annotations

import contextlib
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from launcher.errors import LauncherError, RunDirError
from launcher.json_file import Count, Moment, encode_json, find_json
from launcher.regular_file import overwrite
from launcher.runs.files import write_json
from launcher.runs.rundir import RunDir

_MAX_BYTES = 1 << 25
"""Largest failure.json that is read: earlier versions kept messages of 20 MB."""

FAILURE_FILE_VARIABLE = "LAUNCHER_FAILURE_FILE"
"""The environment variable that names the file for a failure that the run folder cannot hold."""


@dataclass(frozen=True, kw_only=True)
class Failure:
    """The failure of one rank, as failure.json holds it."""

    rank: Count
    """The rank that failed."""

    node: str
    """Name of the rank's node; empty if the rank never wrote a heartbeat."""

    pid: int
    """Process id of the rank on its node; 0 if the rank never wrote a heartbeat."""

    time: Moment
    """When the rank failed, in seconds since 1970."""

    error: str
    """Class of the exception; `Hang` or `Death` where no exception was raised."""

    message: str
    """Text of the exception, and on further lines its notes, such as the call of a function of the
    recipe that raised it; without the values of keys and passwords."""

    traceback: str = ""
    """The traceback; empty if the message alone explains the failure."""

    exit_code: int
    """Exit code of the run."""

    out_of_memory: bool = False
    """Whether the rank ran out of memory, on its GPU or on the host."""

    lost_peer: bool = False
    """Whether the rank failed because another rank was gone: a consequence, not the cause."""

    log_line: int | None = None
    """Line of the rank's log at which the error begins, counted from 1; None if unknown."""

    def to_dict(self) -> dict[str, Any]:
        """Return the content of failure.json."""
        values = asdict(self)
        if self.log_line is None:
            del values["log_line"]
        return values


class RunFailedError(LauncherError):
    """A rank of a run failed or died; the text of the error is the post-mortem of the run.

    Args:
        text: The post-mortem.
        failure: The failure of the rank that failed first.
    """

    def __init__(self, text: str, failure: Failure) -> None:
        super().__init__(text)
        self.failure = failure
        self.exit_code = failure.exit_code
        self.is_shown = False
        """Whether a notebook already shows the post-mortem."""

    def _repr_html_(self) -> str:
        """Return what a notebook shows of this value."""
        from launcher.runs.rich_text import failure_html

        return failure_html(str(self))

    def _render_traceback_(self) -> list[str]:
        lines = super()._render_traceback_()
        return lines[:1] if self.is_shown else lines


def record_failure(run_dir: RunDir, failure: Failure) -> Literal["first", "later", "unwritten"]:
    """Write failure.json unless an earlier failure is there.

    The file is complete from the moment it exists, and exactly one of several ranks that fail
    together is the first: the file is linked into place, which fails if the name is taken. If the
    run folder cannot be written, as on a full disk, the failure goes to the file that the launcher
    named in `LAUNCHER_FAILURE_FILE`, and counts as the first: without a folder to agree in,
    showing a failure twice is better than not showing it.

    Returns:
        "first" if this failure is the first, "later" if another was recorded before, and
        "unwritten" if no file can hold the failure, so that the caller has to show it.
    """
    temporary = run_dir.failure.with_name(f".failure.{os.uname().nodename}.{os.getpid()}.tmp")
    text = encode_json(failure.to_dict(), indent=2) + "\n"
    try:
        overwrite(temporary, text.encode())
        os.link(temporary, run_dir.failure)
    except FileExistsError:
        return "later"
    except OSError:
        return "first" if _write_to_launcher(text) else "unwritten"
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    return "first"


def _write_to_launcher(text: str) -> bool:
    """Write to the file that the launcher reads when the run folder is unusable, if it is named.

    Returns:
        Whether the text was written.
    """
    path = os.environ.get(FAILURE_FILE_VARIABLE)
    if path is None:
        return False
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError:
        return False
    return True


def replace_failure(run_dir: RunDir, failure: Failure) -> None:
    """Write failure.json, in place of a failure that was a consequence of this one.

    Raises:
        RunDirError: The run folder cannot be written.
    """
    write_json(run_dir.failure, failure.to_dict())


def fallback_failure_path(folder: Path, local_rank: int) -> Path:
    """Return the file in the launcher's own folder for the failure of one of its ranks."""
    return folder / f"failure{local_rank}.json"


def read_failure(run_dir: RunDir) -> Failure | None:
    """Return the run's first failure, or None if failure.json does not exist.

    Raises:
        RunDirError: failure.json cannot be read, is damaged, or is not from launcher.
    """
    return _read(run_dir.failure)


def find_failure(run_dir: RunDir, fallback: Path) -> Failure | None:
    """Return the failure that the ranks left, or None if no readable one exists.

    Unlike `read_failure` this never raises: a damaged record must not hide that a rank failed.

    Args:
        run_dir: The run folder, which is read first.
        fallback: The file for a failure that the run folder cannot hold.
    """
    for path in (run_dir.failure, fallback):
        with contextlib.suppress(RunDirError):
            if (failure := _read(path)) is not None:
                return failure
    return None


def _read(path: Path) -> Failure | None:
    return find_json(
        path,
        Failure,
        max_bytes=_MAX_BYTES,
        remedy="The logs of the ranks hold the error that ended the run; delete the file to "
        "continue without it.",
    )
