"""mirror.json: the URL at which a run is kept as well, and what was stored there last."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from launcher.errors import RunDirError
from launcher.json_file import Count, find_json
from launcher.object_stores.locations import shown_url
from launcher.runs.files import write_json
from launcher.runs.rundir import RunDir


@dataclass(frozen=True, kw_only=True)
class MirrorRecord:
    """The mirror of a run folder, as mirror.json describes it."""

    url: str
    """The URL."""

    sessions: tuple[str, ...] = ()
    """Ids of the processes that have mirrored this folder, or written what it was downloaded from.

    If the store names another one, the run was continued elsewhere, and this folder is outdated."""

    stored_step: Count | None = None
    """The step of the newest checkpoint in the store; None if there is none."""

    problem: str = ""
    """Why the store lacks what the folder has; empty if it lacks nothing."""


def read_mirror(run_dir: RunDir) -> MirrorRecord | None:
    """Return the mirror of a run folder, or None if it has none.

    Raises:
        RunDirError: mirror.json is damaged.
    """
    return find_json(run_dir.mirror, MirrorRecord, error=RunDirError)


def mirror_problem(run_dir: RunDir) -> str:
    """Return one line that says why the store of a run lacks what the folder has.

    Returns:
        The line; empty if the run has no mirror, or its store lacks nothing.
    """
    try:
        record = read_mirror(run_dir)
    except RunDirError as error:
        return str(error)
    if record is None or not record.problem:
        return ""
    step = record.stored_step
    stored = "no checkpoint is there" if step is None else f"step {step:,} is the newest there"
    return f"uploads to {shown_url(record.url)} fail ({stored}): {record.problem}"


def write_mirror(run_dir: RunDir, record: MirrorRecord) -> None:
    """Write mirror.json, completely or not at all.

    Raises:
        RunDirError: It cannot be written.
    """
    write_json(run_dir.mirror, asdict(record))
