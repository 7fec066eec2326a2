"""When a mirror uploads what, and what happens when the store fails.

A failed upload never stops the training. It is warned about once, and tried again, with pauses of
up to a minute, until it succeeds.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace

from launcher.errors import LauncherError, StoreError
from launcher.mirrors.run_mirror import RunMirror
from launcher.mirrors.store_lock import SECONDS_BETWEEN_WRITES, LostLockError, StoreLock
from launcher.printable import error_line
from launcher.runs.mirror_record import MirrorRecord, write_mirror
from launcher.runs.rundir import RunDir

_SECONDS_BETWEEN_LOOKS = 0.5
"""How often the run folder is looked at for a new checkpoint."""

_SECONDS_BETWEEN_RECORDS = 60.0
"""How often records that grow are uploaded between checkpoints."""

_SHARE_OF_TIME = 0.05
"""Largest share of the time that is spent on uploading records that grow."""

_FIRST_PAUSE, _LONGEST_PAUSE = 2.0, 60.0
"""Seconds after a failed upload; each pause is twice as long as the one before."""


class MirrorLoop:
    """Keeps a URL up to date in a thread, and the lock of the URL in another one.

    Args:
        mirror: What brings it up to date.
        lock: The lock, which this process has.
        run_dir: The run folder.
        record: The content of mirror.json.
        warn: Called with a text when uploads begin to fail, and when they work again.
    """

    def __init__(
        self,
        mirror: RunMirror,
        lock: StoreLock,
        run_dir: RunDir,
        record: MirrorRecord,
        warn: Callable[[str], object],
    ) -> None:
        self._mirror, self._lock, self._run_dir = mirror, lock, run_dir
        self._record, self._warn = record, warn
        self._finishes, self._ends = threading.Event(), threading.Event()
        self.problem = ""
        """Why the last upload failed; empty if it did not."""

        self.is_complete = False
        """Whether everything has been uploaded after `finish`."""

        self.is_pausing = False
        """Whether an upload has just failed, and is going to be tried again."""

        self._threads = [
            threading.Thread(target=function, name=name, daemon=True)
            for function, name in ((self._upload, "uploads"), (self._keep_lock, "lock"))
        ]
        for thread in self._threads:
            thread.start()

    @property
    def is_done(self) -> bool:
        """Whether nothing more will be uploaded."""
        return not self._threads[0].is_alive()

    @property
    def num_objects(self) -> int:
        """Number of objects that have been written or deleted so far."""
        return self._mirror.num_objects

    def finish(self) -> None:
        """Upload what is left, of a run that has ended, without further pauses."""
        self._finishes.set()

    def end(self, seconds: float) -> None:
        """Begin nothing more, and wait until the lock is not being written."""
        self._ends.set()
        self._threads[1].join(seconds)

    def _upload(self) -> None:
        next_records, pause = 0.0, _FIRST_PAUSE
        while self._mirror.may_write() and not self._ends.is_set():
            finishes = self._finishes.is_set()  # before the folder is looked at
            has_new = self._mirror.has_new_checkpoints()
            if not (finishes or has_new or time.monotonic() >= next_records):
                self._finishes.wait(_SECONDS_BETWEEN_LOOKS)
                continue
            started = time.monotonic()
            try:
                self._mirror.upload_records()
                self._mirror.upload_checkpoints()
                if has_new:
                    self._mirror.upload_records()
            except Exception as error:  # noqa: BLE001  # training goes on, whatever happens here
                if not self._mirror.may_write():  # and that was said
                    return
                self._report(str(error) if isinstance(error, LauncherError) else error_line(error))
                pause = self._pause(pause, finishes=finishes)
                continue
            now = time.monotonic()
            rest = max(_SECONDS_BETWEEN_RECORDS, (now - started) / _SHARE_OF_TIME)
            next_records, pause = now + rest, _FIRST_PAUSE
            self._report("")
            if finishes:
                self.is_complete = True
                return

    def _pause(self, seconds: float, *, finishes: bool) -> float:
        """Wait after a failed upload, but not beyond the end of the run; return the next pause."""
        self.is_pausing = True
        woken = (self._ends if finishes else self._finishes).wait(seconds)
        self.is_pausing = False
        return _FIRST_PAUSE if woken else min(2 * seconds, _LONGEST_PAUSE)

    def _report(self, problem: str) -> None:
        """Warn when uploads begin to fail or work again, and say so in mirror.json."""
        if problem and not self.problem:
            self._warn(f"{problem} The run continues, and uploads are tried again.")
        elif self.problem and not problem:
            self._warn(f"uploads to {self._record.url} work again")
        self._note(problem)

    def _note(self, problem: str) -> None:
        """Write into mirror.json what the store has, and why it lacks the rest."""
        self.problem = problem
        record = replace(self._record, stored_step=self._mirror.stored_step, problem=problem)
        if record != self._record:
            self._record = record
            with contextlib.suppress(LauncherError):  # a full disk: the run itself says so
                write_mirror(self._run_dir, record)

    def _keep_lock(self) -> None:
        while not self._ends.wait(SECONDS_BETWEEN_WRITES):
            try:
                self._lock.refresh()
            except LostLockError as error:
                self._mirror.lose_lock()
                self._note(str(error))
                self._warn(str(error))
                return
            except StoreError:
                pass  # uploads fail as well, and say so
