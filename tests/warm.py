"""Commands that start warm: forked from a process that has imported what `launcher` imports.

Importing torch takes longer than most tests. What is forked is the command as it is, in a session,
a folder and an environment of its own, with its own output; only its interpreter has started
before.
"""

from __future__ import annotations

import atexit
import ctypes
import importlib
import io
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

_PRELOADED = (
    "launcher.cli",
    "launcher.engine.worker",
    "launcher.engine.backends.accelerate",
    "torch._dynamo",
    "torch.distributed.fsdp",
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Warm:
    """The process that forks, and this one as the parent of what it forks."""

    def __init__(self, env: dict[str, str]) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._socket, theirs = socket.socketpair()
        self._lock = threading.Lock()
        with theirs:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        atexit.register(self._end)

    def start(self, command: list[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
        """Start a command of `launcher`; it is a child of this process."""
        out, their_out = os.pipe()
        err, their_err = os.pipe()
        request = {"command": command, "folder": str(folder), "env": env}
        with self._lock:
            message = json.dumps(request).encode()
            socket.send_fds(self._socket, [len(message).to_bytes(4, "big")], [their_out, their_err])
            self._socket.sendall(message)
            pid = int.from_bytes(_read(self._socket, 4), "big")
        os.close(their_out)
        os.close(their_err)
        return _Started(command, pid, out, err)

    def _end(self) -> None:
        self._socket.close()
        self._server.wait()


class _Started(subprocess.Popen[str]):
    """A process that somebody else has forked for us."""

    def __init__(self, command: list[str], pid: int, out: int, err: int) -> None:
        self.args = command
        self.pid = pid
        self.returncode = None
        self.stdin = None
        self.stdout = io.TextIOWrapper(os.fdopen(out, "rb"))
        self.stderr = io.TextIOWrapper(os.fdopen(err, "rb"))
        self.encoding = self.errors = self.pipesize = None
        self.text_mode = True
        self._child_created = True
        self._communication_started = False
        self._input = None
        self._sigint_wait_secs = 0.25
        self._closed_child_pipe_fds = True
        self._waitpid_lock = threading.Lock()


def _read(stream: socket.socket, count: int) -> bytes:
    found = b""
    while len(found) < count:
        piece = stream.recv(count - len(found))
        if not piece:
            raise EOFError
        found += piece
    return found


def serve(stream: socket.socket) -> None:
    """Fork what is asked for, until nobody can ask any more."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    for module in _PRELOADED:
        importlib.import_module(module)
    while True:
        head, files, _, _ = socket.recv_fds(stream, 4, 2)
        if not head:
            return
        head += _read(stream, 4 - len(head)) if len(head) < 4 else b""
        request = json.loads(_read(stream, int.from_bytes(head, "big")))
        told, tell = os.pipe()
        between = os.fork()
        if between == 0:
            pid = os.fork()
            if pid:
                os.write(tell, pid.to_bytes(4, "big"))
                os._exit(0)  # the command is the child of whoever asked for it
            os.close(told)
            os.close(tell)
            stream.close()
            run(request["command"], request["folder"], request["env"], files)
        os.waitpid(between, 0)
        stream.sendall(os.read(told, 4))
        for each in (told, tell, *files):
            os.close(each)


def run(command: list[str], folder: str, env: dict[str, str], files: list[int]) -> None:
    """Be the command, from its first line to its exit code."""
    os.setsid()
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # remembered from another environment
    sys.argv, sys.orig_argv = list(command), [sys.executable, *command]
    sys.path[0] = str(Path(command[0]).parent)
    code: object = 1
    try:
        from launcher.cli import main

        main()
    except SystemExit as ended:
        code = ended.code
    except BaseException:  # noqa: BLE001  # shown, as the interpreter would
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
