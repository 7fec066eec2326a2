"""The process that mirrors a run, a child of its launcher, and the lines of JSON between the two.

It is a process of its own because clients of stores start threads, and the launcher forks its
ranks. It ignores signals, which the launcher handles, and ends when the launcher ends.
"""

from __future__ import annotations

import contextlib
import os
import select
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeVar

from launcher.errors import LauncherError, StoreError
from launcher.json_file import decode_json, encode_json
from launcher.mirrors.mirror_loop import MirrorLoop
from launcher.mirrors.opened_url import OpenedURL, open_url
from launcher.object_stores.object_store import ObjectStore
from launcher.runs.mirror_record import MirrorRecord, write_mirror
from launcher.runs.process_owner import ProcessOwner
from launcher.runs.rundir import RunDir

_SECONDS_BETWEEN_LOOKS = 0.2
_SECONDS_TO_END = 3.0
"""Longest time in which this process ends after its launcher."""

_SECONDS_TO_JOIN = 5.0
"""Longest wait for a write of the lock that is under way before the lock is released."""

_T = TypeVar("_T")


@dataclass(frozen=True, kw_only=True)
class MirrorRequest:
    """The first line that the launcher sends."""

    url: str
    owner: ProcessOwner
    sessions: tuple[str, ...] = ()
    """Sessions of the run that is mirrored there; empty for a new run."""

    takes_over: bool = False
    """Whether the processes of `sessions` are known to have ended."""

    give_up_seconds: float
    """How long uploads are tried without any success once the run has ended."""


@dataclass(frozen=True, kw_only=True)
class Instruction:
    """A later line that the launcher sends."""

    folder: str | None = None
    """The run folder, from when on it is mirrored."""

    finishes: bool = False
    """Whether the run has ended, so that this process is to upload the rest and end."""


@dataclass(frozen=True, kw_only=True)
class Answer:
    """A line that this process sends: the URL can be used, or the mirror is complete."""

    problem: str = ""
    """Why that is not so; empty if it is."""


def serve_mirror() -> int:
    """Mirror the run that standard input names, and return the exit code of this process."""
    _end_with(os.getppid())
    lines = _Lines(0)
    request = lines.read(MirrorRequest)
    if request is None:
        return 0
    try:
        opened = open_url(
            ObjectStore(request.url),
            request.owner,
            request.sessions,
            _warn,
            takes_over=request.takes_over,
        )
    except LauncherError as error:
        _answer(Answer(problem=str(error)))
        return 0
    _opened.append(opened)
    _answer(Answer())
    problem = _mirror(lines, request, opened)
    _release()
    if problem is not None:
        _answer(Answer(problem=problem))
    os._exit(0)  # an upload that hangs must not keep this process


def _mirror(lines: _Lines, request: MirrorRequest, opened: OpenedURL) -> str | None:
    """Mirror the run until it ends.

    Returns:
        Why the store lacks something then; None if the launcher gives up before the end.
    """
    instruction = lines.read(Instruction)
    if instruction is None or instruction.folder is None:
        return None
    run_dir = RunDir(Path(instruction.folder))
    record = MirrorRecord(url=request.url, sessions=(*request.sessions, opened.index.session))
    try:
        write_mirror(run_dir, record)
    except LauncherError as error:
        _warn(f"{error} `launcher resume` will not know the mirror.")
    loop = MirrorLoop(opened.mirror(run_dir), opened.lock, run_dir, record, _warn)
    finishes = lines.read(Instruction) is not None
    if finishes:
        loop.finish()
        _wait(loop, request.give_up_seconds)
    loop.end(_SECONDS_TO_JOIN)
    if not finishes:
        return None
    unknown = "" if loop.is_complete else f"Uploads to {request.url} ended early."
    return loop.problem or unknown


def _wait(loop: MirrorLoop, seconds: float) -> None:
    """Wait until everything is uploaded, or until uploads have only failed for some time.

    One that takes long, such as that of a large file, is waited for.
    """
    num_objects, moved = loop.num_objects, time.monotonic()
    while not loop.is_done:
        time.sleep(_SECONDS_BETWEEN_LOOKS)
        if loop.num_objects != num_objects:
            num_objects, moved = loop.num_objects, time.monotonic()
        if loop.is_pausing and time.monotonic() - moved > seconds:
            return


class _Lines:
    """Reads lines from a descriptor, as values.

    Args:
        descriptor: The descriptor.
    """

    def __init__(self, descriptor: int) -> None:
        self._descriptor, self._content = descriptor, b""

    def read(self, kind: type[_T]) -> _T | None:
        """Return the next line as a value of a type, or None at the end of the input."""
        while b"\n" not in self._content:
            select.select([self._descriptor], [], [])
            block = os.read(self._descriptor, 65536)
            if not block:
                return None
            self._content += block
        line, _, self._content = self._content.partition(b"\n")
        return decode_json(line, kind)


def _answer(answer: Answer) -> None:
    with contextlib.suppress(OSError):  # the launcher has ended
        sys.stdout.write(encode_json(asdict(answer)) + "\n")
        sys.stdout.flush()


def _warn(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        print(f"launcher: {text}", file=sys.stderr, flush=True)


def _end_with(launcher: int) -> None:
    """End this process when its launcher ends, whatever it is doing then.

    The ranks of a killed launcher may hold its end of the pipe open for a while.
    """

    def watch() -> None:
        while os.getppid() == launcher:
            time.sleep(_SECONDS_BETWEEN_LOOKS)
        release = threading.Thread(target=_release, daemon=True)
        release.start()
        release.join(_SECONDS_TO_END)
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


_opened: list[OpenedURL] = []
"""The URL whose lock this process has."""


def _release() -> None:
    for each in _opened:
        with contextlib.suppress(StoreError):
            each.lock.release()
