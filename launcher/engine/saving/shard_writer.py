"""The process of a rank that writes its part of each checkpoint beside the training.

A thread would take turns with the training for Python's lock and compete with it for cores. The
process is a new interpreter without torch, started before the first checkpoint. It steps back for
cores and disks, and reads the copies from memory that it shares with the rank.

The process may be killed, by the kernel when memory runs out for example, and a limit of processes
may not allow it. The copies are still there then, and a thread writes them.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launcher.engine.saving.checkpoint_tensors import describe_shard
from launcher.engine.state.training_state import Snapshot
from launcher.json_file import encode_json
from launcher.runs import shard_files
from launcher.runs.shard_files import MAX_ANSWER, REQUEST, Piece, error_text, write_files
from launcher.signals import signals_blocked

_SECONDS_TO_CHECK = 1.0
"""Interval at which a wait for an answer checks that the process is alive."""


class _ProcessLostError(Exception):
    """The process has ended; the text says how."""


class _WriterProcess:
    """A process that runs `launcher.runs.shard_files`. It ends with this one, however that ends.

    Raises:
        OSError: The process cannot be started.
    """

    def __init__(self) -> None:
        self._channel, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        program = [sys.executable, "-I", "-S", shard_files.__file__]
        try:
            with other, signals_blocked():  # signals to all processes of a job concern the rank
                self._process = subprocess.Popen(
                    [*program, str(other.fileno()), str(os.getpid())],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(other.fileno(),),
                )
        except OSError:
            self._channel.close()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def request(self, memory: int, folder: int, place: Piece) -> None:
        """Ask for the files of a request; `answer` tells when they are written.

        Raises:
            _ProcessLostError: The process has ended.
        """
        try:
            socket.send_fds(self._channel, [REQUEST.pack(*place)], [memory, folder])
        except OSError as error:
            raise self._lost() from error

    def listen(self, host: str, token: str, folder: Path) -> int:
        """Let the process receive files of another rank, and return the port.

        Args:
            host: Address of this node.
            token: The letters that the sender begins with.
            folder: The folder of this rank's quick checkpoints.

        Raises:
            OSError: It cannot listen there.
            _ProcessLostError: The process has ended.
        """
        request = {"host": host, "token": token, "folder": str(folder)}
        try:
            self._channel.send(encode_json(request).encode())
        except OSError as error:
            raise self._lost() from error
        answer = self.answer(waits=True)
        assert answer is not None
        if "error" in answer:
            raise OSError(answer["error"])
        return int(answer["port"])

    def answer(self, *, waits: bool) -> dict[str, Any] | None:
        """Return the answer to the last request, or None if there is none yet.

        Args:
            waits: Whether to wait for the answer.

        Raises:
            _ProcessLostError: The process has ended.
        """
        self._channel.settimeout(_SECONDS_TO_CHECK if waits else 0)
        while True:
            with contextlib.suppress(TimeoutError, BlockingIOError):
                try:
                    message = self._channel.recv(MAX_ANSWER)
                except ConnectionError:
                    message = b""
                if not message:
                    raise self._lost()
                answer: dict[str, Any] = json.loads(message)
                return answer
            if self._process.poll() is not None:
                raise self._lost()
            if not waits:
                return None

    def close(self) -> None:
        """End the process at once."""
        self._channel.close()
        self._process.kill()
        self._process.wait()

    def _lost(self) -> _ProcessLostError:
        self._channel.close()
        code = self._process.wait()
        how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        return _ProcessLostError(f"its process has ended ({how})")


@dataclass(frozen=True, kw_only=True)
class WrittenShard:
    """What became of a rank's part of a checkpoint."""

    error: str | None = None
    """Why it could not be written; None if it was."""

    note: str | None = None
    """Why a thread wrote it in place of a process; None if none did, or if that was told before."""

    seconds: float = 0.0
    """Time that it took to write."""

    num_bytes: int = 0
    """Bytes of the files."""


class PendingShard:
    """A rank's part of a checkpoint that is being written.

    Args:
        writer: The writer of this rank.
        folder: The folder of the checkpoint.
        rank: The rank.
        state: The copies on the host, which are released when they have been written.
        to: Where the process also sends the files, as `launcher.runs.part_exchange.target` returns
            it. No thread takes its place then.
    """

    def __init__(
        self,
        writer: ShardWriter,
        folder: Path,
        rank: int,
        state: Snapshot,
        to: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self._is_sent = folder, to is not None
        self.started = time.perf_counter()
        self.outcome = WrittenShard()
        """What became of it, once it is done."""

        self._writer, self._state = writer, state
        self._note: str | None = None
        self._is_done = False
        self._folder = -1
        self._thread: threading.Thread | None = None
        self._answer: dict[str, Any] | None = None
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            self._folder = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
            self._place = describe_shard(rank, state.tensors, state.memory, to)
        except Exception as error:  # noqa: BLE001  # all ranks learn of it
            self._end({"error": error_text(error)})
        else:
            self._request()

    @property
    def is_done(self) -> bool:
        """Whether the part has been written, or cannot be."""
        if not self._is_done:
            self._receive(waits=False)
        return self._is_done

    def wait(self) -> None:
        """Wait until the part has been written, or cannot be."""
        while not self._is_done:
            self._receive(waits=True)

    def _request(self) -> None:
        """Let the process write, or a thread if there can be none."""
        try:
            process = self._writer.process()
        except OSError as error:
            self._write_in_thread(f"no process can be started for it ({error_text(error)})")
            return
        try:
            process.request(self._state.memory.descriptor, self._folder, self._place)
        except _ProcessLostError as lost:
            self._replace_process(lost)

    def _receive(self, *, waits: bool) -> None:
        """Take the answer of the process or of the thread, if there is one."""
        if self._thread is not None:
            if waits:
                self._thread.join()
            answer = self._answer
        else:
            try:
                answer = self._writer.process().answer(waits=waits)
            except _ProcessLostError as lost:
                self._replace_process(lost)
                return
        if answer is not None:
            self._end(answer)

    def _replace_process(self, lost: _ProcessLostError) -> None:
        self._writer.forget_process()
        self._write_in_thread(str(lost))

    def _write_in_thread(self, reason: str) -> None:
        if self._is_sent:
            self._end({"error": reason})
            return
        self._note = self._writer.note_once(reason)
        self._thread = threading.Thread(target=self._write, name="checkpoint", daemon=True)
        self._thread.start()

    def _write(self) -> None:
        """Write in a thread, which touches no GPU: it would be the first one of the machine."""
        try:
            self._answer = write_files(self._state.memory.descriptor, self._folder, self._place)
        except Exception as error:  # noqa: BLE001  # all ranks learn of it
            self._answer = {"error": error_text(error)}

    def _end(self, answer: dict[str, Any]) -> None:
        """Keep what became of the part, and give the copies back."""
        self.outcome = WrittenShard(note=self._note, **answer)
        self._state.tensors.clear()
        self._state.release()
        if self._folder >= 0:
            os.close(self._folder)
        self._is_done = True


class ShardWriter:
    """Writes the parts of one rank, one checkpoint after the other."""

    def __init__(self) -> None:
        self._process: _WriterProcess | None = None
        self._listens: _WriterProcess | None = None
        """The process that receives files of another rank."""

        self._was_told = False

    def start(
        self, folder: Path, rank: int, state: Snapshot, to: Mapping[str, Any] | None = None
    ) -> PendingShard:
        """Start to write a part of a checkpoint; no other may be pending."""
        return PendingShard(self, folder, rank, state, to)

    def listen(self, host: str, token: str, folder: Path) -> int:
        """Let the process receive files of another rank, and return its port.

        Nothing may be pending. `is_listening` tells whether it still does.

        Raises:
            OSError: No process can be started, or it cannot listen.
        """
        try:
            port = self.process().listen(host, token, folder)
        except _ProcessLostError as lost:
            self.forget_process()
            raise OSError(str(lost)) from None
        self._listens = self._process
        return port

    @property
    def is_listening(self) -> bool:
        """Whether the process that `listen` was called for is still the one that writes."""
        return self._listens is not None and self._listens is self._process

    def process(self) -> _WriterProcess:
        """Return the process that writes, which is started if there is none.

        Raises:
            OSError: It cannot be started.
        """
        if self._process is None:
            self._process = _WriterProcess()
        return self._process

    def forget_process(self) -> None:
        """Let the next part have a new process, because this one has ended."""
        self._process = None

    def note_once(self, reason: str) -> str | None:
        """Return why a thread writes, or None if that has been told."""
        was_told, self._was_told = self._was_told, True
        return None if was_told else reason

    def close(self) -> None:
        """End the process; a pending part stays incomplete."""
        if self._process is not None:
            self._process.close()
        self._process = None
