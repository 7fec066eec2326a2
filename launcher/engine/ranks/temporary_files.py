"""Where multiprocessing keeps the sockets of a rank and its DataLoader workers.

By itself it makes a folder that a process removes when it exits normally. Ranks and workers are
often killed, or exit at once, and would leave that folder behind. Temporary files that torch makes
while it waits for a worker are kept in the same folder.
"""

from __future__ import annotations

import contextlib
import multiprocessing.util
import os
import tempfile
from collections.abc import Iterator
from multiprocessing import process
from pathlib import Path
from typing import Any

from launcher.errors import WorldError

_MAX_ADDRESS_BYTES = 107
"""Maximum length of the address of a Unix socket (Linux, unix(7))."""

_SOCKET_BYTES = len("/listener-xxxxxxxx")
_FOLDER_BYTES = len("/pymp-xxxxxxxx")
"""Lengths of the names that multiprocessing appends to the temporary folder."""


@contextlib.contextmanager
def sockets_in(folder: Path) -> Iterator[None]:
    """Let this process and its children keep their sockets in `folder`, which outlives them.

    A folder with a path that is too long for sockets is not used.
    """
    fits = len(os.fsencode(folder)) + _SOCKET_BYTES <= _MAX_ADDRESS_BYTES
    if not fits or "tempdir" in _configuration():
        yield
        return
    _configuration()["tempdir"] = str(folder)
    try:
        yield
    finally:
        _configuration().pop("tempdir", None)


@contextlib.contextmanager
def temporary_files_beside_sockets() -> Iterator[None]:
    """Let this process make its temporary files in the folder of `sockets_in`, if there is one.

    If a batch cannot be received from a worker, torch opens ten temporary files to find out whether
    too many files are open. The signal of the worker's death, or the end of the rank, may interrupt
    that and leave a file behind.
    """
    folder = _configuration().get("tempdir")
    if folder is None:
        yield
        return
    former, tempfile.tempdir = tempfile.tempdir, folder
    try:
        yield
    finally:
        tempfile.tempdir = former


def check_temporary_folder() -> None:
    """Check that the path of the temporary folder is short enough for the sockets of workers.

    Raises:
        WorldError: The path is too long.
    """
    if "tempdir" in _configuration():
        return
    # Python 3.14 falls back to /tmp if the path is too long.
    get_base_folder = getattr(multiprocessing.util, "_get_base_temp_dir", None)
    folder = tempfile.gettempdir() if get_base_folder is None else get_base_folder(tempfile)
    length = len(os.fsencode(folder))
    max_length = _MAX_ADDRESS_BYTES - _SOCKET_BYTES - _FOLDER_BYTES
    if length > max_length:
        raise WorldError(
            "DataLoader workers send batches through Unix sockets in the temporary folder. Its "
            f"path has {length} bytes, but the address of a socket leaves room for {max_length}: "
            f"{folder}. Set TMPDIR to a folder with a shorter path, or use num_workers=0."
        )


def _configuration() -> dict[str, Any]:
    """Return what this process and the children that it starts have in common."""
    return process.current_process()._config  # type: ignore[attr-defined]  # noqa: SLF001
