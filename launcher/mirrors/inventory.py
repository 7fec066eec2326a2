"""Which files of a run folder are mirrored, and in which order."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.runs.rundir import RunDir

CHECKPOINTS = "checkpoints"
"""The folder of the checkpoints, which are mirrored by themselves."""

INDEX, LOCK = "objects.json", "mirror.lock"
"""Objects that no file of the run folder stands for."""

RESULT, RECORD = "result.json", "run.yaml"
"""What tells that a run has finished, and what makes a folder one of a run."""

_LEFT_OUT = frozenset({CHECKPOINTS, INDEX, LOCK, "mirror.json", "owner.lock", "quick.json"})
_SHORT_LIVED = re.compile(r"health/(rank\d+\.json|debugger)|(.*/)?\.[^/]*|.*\.tmp")
"""Heartbeats, hidden files and files that are being written; not in the copy of the code."""


@dataclass(frozen=True, kw_only=True)
class FileState:
    """What tells that a file has not been written since."""

    num_bytes: int
    """Its size."""

    modified: int
    """When it was written, in nanoseconds since 1970."""

    inode: int
    """Its inode, which differs once a file is replaced."""


def list_records(run_dir: RunDir) -> dict[str, FileState]:
    """Return the files of a run folder that are mirrored, except checkpoints, by name.

    Names are relative to the folder. Links are left out, and names that are not Unicode.
    """
    states = {}
    for name, status in _walk(run_dir.path):
        is_code = name.startswith("code/")
        if name in _LEFT_OUT or (not is_code and _SHORT_LIVED.fullmatch(name)):
            continue
        states[name] = FileState(
            num_bytes=status.st_size, modified=status.st_mtime_ns, inode=status.st_ino
        )
    return states


def _walk(folder: Path, prefix: str = "") -> Iterator[tuple[str, os.stat_result]]:
    """Yield the name and the status of each regular file below a folder."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: entry.name)
    except OSError:
        return
    for entry in entries:
        name = prefix + entry.name
        if not _is_unicode(name):
            continue
        try:
            status = entry.stat(follow_symlinks=False)
        except OSError:  # removed meanwhile
            continue
        if stat.S_ISREG(status.st_mode):
            yield name, status
        elif stat.S_ISDIR(status.st_mode) and name != CHECKPOINTS and not _is_hidden(name):
            yield from _walk(Path(entry.path), f"{name}/")


def _is_hidden(name: str) -> bool:
    return not name.startswith("code/") and name.rpartition("/")[2].startswith(".")


def _is_unicode(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def upload_order(names: Mapping[str, FileState]) -> list[str]:
    """Return names of records in the order of their upload.

    The record of the run comes first and its result last, so that a run that looks finished is.
    """
    rank = {RECORD: 0, RESULT: 2}
    return sorted(names, key=lambda name: (rank.get(name, 1), names[name].num_bytes, name))


def checkpoint_object(checkpoint: str, file: str) -> str:
    """Return the name of the object for a file of a checkpoint."""
    return f"{CHECKPOINTS}/{checkpoint}/{file}"
