"""The launcher's side of a mirror: start its process, tell it what happens, wait for its end."""

from __future__ import annotations

import contextlib
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

from launcher.environment.program import own_program
from launcher.errors import LauncherError, StoreError
from launcher.json_file import DamagedJSONError, decode_json, encode_json
from launcher.mirrors.mirror_process import Answer, Instruction, MirrorRequest
from launcher.runs.mirror_record import read_mirror
from launcher.runs.process_owner import this_process
from launcher.runs.rundir import RunDir
from launcher.signals import signals_blocked

MIRROR_FLAG = "--mirror-process"
"""First argument of a process that mirrors a run."""

_SECONDS_TO_END = 10.0
_SECONDS_BETWEEN_STARTS = 60.0
"""Shortest time between two starts of the process in a run."""


class MirrorClient:
    """The mirror of the run that this process launches.

    Args:
        url: Where the run is mirrored.
        sessions: Sessions of the run that is mirrored there; empty for a new run.
        give_up_seconds: How long uploads are tried without any success once the run has ended.
        warn: Called with a text for the user.
        takes_over: Whether the processes of `sessions` are known to have ended, because this
            process owns their run folder.
    """

    def __init__(
        self,
        url: str,
        sessions: Sequence[str],
        give_up_seconds: float,
        warn: Callable[[str], object],
        *,
        takes_over: bool = False,
    ) -> None:
        self._request = MirrorRequest(
            url=url,
            owner=this_process(),
            sessions=tuple(sessions),
            takes_over=takes_over,
            give_up_seconds=give_up_seconds,
        )
        self._warn = warn
        self._run_dir: RunDir | None = None
        self._process: subprocess.Popen[bytes] | None = None
        self._last_start = 0.0

    def open(self) -> None:
        """Start the process, and wait until it has the URL.

        Raises:
            StoreError: The URL cannot be used.
        """
        self._last_start = time.monotonic()
        with signals_blocked():  # signals are for this process to handle
            self._process = subprocess.Popen(
                [*own_program(), MIRROR_FLAG],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
            )
        self._send(self._request)
        answer = self._receive()
        if answer is None or answer.problem:
            self.close()
            text = "" if answer is None else answer.problem
            raise StoreError(text or f"The process that mirrors to {self._request.url} has ended.")

    def attach(self, run_dir: RunDir) -> None:
        """Mirror a run folder from now on."""
        self._run_dir = run_dir
        self._send(Instruction(folder=str(run_dir.path)))

    def restart_if_ended(self) -> None:
        """Start the process again if it has been killed, at most once a minute."""
        if self._process is None or self._process.poll() is None or self._run_dir is None:
            return
        if time.monotonic() - self._last_start < _SECONDS_BETWEEN_STARTS:
            return
        self._warn("the process that mirrors the run has ended, and is started again")
        with contextlib.suppress(LauncherError):  # tried again in a minute, and at the end
            self._restart()

    def finish(self) -> str:
        """Wait until everything is in the store; return why it is not, or an empty text."""
        if self._run_dir is None:
            return ""
        try:
            answer = self._finish_once()
            if answer is None:  # the process was killed
                self._restart()
                answer = self._finish_once()
        except LauncherError as error:
            return str(error)
        finally:
            self.close()
        return "The process that mirrors the run was killed." if answer is None else answer.problem

    def close(self) -> None:
        """End the process, which then uploads nothing more."""
        process, self._process = self._process, None
        if process is None:
            return
        for pipe in (process.stdin, process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        try:
            process.wait(_SECONDS_TO_END)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()

    def _restart(self) -> None:
        assert self._run_dir is not None
        self.close()
        if (record := read_mirror(self._run_dir)) is not None:
            self._request = replace(self._request, sessions=record.sessions)
        self.open()
        self.attach(self._run_dir)

    def _finish_once(self) -> Answer | None:
        self._send(Instruction(finishes=True))
        return self._receive()

    def _send(self, message: Any) -> None:
        if self._process is None or self._process.stdin is None:
            return
        with contextlib.suppress(OSError):  # it has ended, which the next answer shows
            self._process.stdin.write((encode_json(asdict(message)) + "\n").encode())
            self._process.stdin.flush()

    def _receive(self) -> Answer | None:
        if self._process is None or self._process.stdout is None:
            return None
        try:
            return decode_json(self._process.stdout.readline(), Answer)
        except (DamagedJSONError, OSError):
            return None
