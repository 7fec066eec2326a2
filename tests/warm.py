"""Start commands warm: fork them from a server that has imported what `launcher` imports.

Importing torch takes longer than most tests. A forked command, which is a console script or a file
of Python, runs its normal code in a session, a folder and an environment of its own, with its own
output. Only its interpreter started earlier. The processes that it starts are started as ever.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import importlib
import io
import json
import multiprocessing.process
import os
import runpy
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
    "launcher.engine.backends.fsdp",
    "launcher.engine.backends.deepspeed",
    "torch._dynamo",
    "torch.distributed.fsdp",
)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Warm:
    """Handle of a server process that forks commands as children of this process."""

    def __init__(self, env: dict[str, str]) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self._socket, server_socket = socket.socketpair()
        self._lock = threading.Lock()
        with server_socket:
            self._server = subprocess.Popen(
                [sys.executable, __file__, str(server_socket.fileno())],
                pass_fds=[server_socket.fileno()],
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        atexit.register(self._end)

    def start(self, command: list[str], folder: Path, env: dict[str, str]) -> subprocess.Popen[str]:
        """Start a console script, or `python` with a file, as a child of this process."""
        out, command_out = os.pipe()
        err, command_err = os.pipe()
        request = {"command": command, "folder": str(folder), "env": env}
        with self._lock:
            message = json.dumps(request).encode()
            length = len(message).to_bytes(4, "big")
            socket.send_fds(self._socket, [length], [command_out, command_err])
            self._socket.sendall(message)
            pid = int.from_bytes(_read_exactly(self._socket, 4), "big")
        os.close(command_out)
        os.close(command_err)
        return _ForkedProcess(command, pid, out, err)

    def _end(self) -> None:
        self._socket.close()
        self._server.wait()


class _ForkedProcess(subprocess.Popen[str]):
    """Popen object of a child that the server has forked instead of Popen."""

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


def _read_exactly(stream: socket.socket, num_bytes: int) -> bytes:
    data = b""
    while len(data) < num_bytes:
        chunk = stream.recv(num_bytes - len(data))
        if not chunk:
            raise EOFError
        data += chunk
    return data


def serve(stream: socket.socket) -> None:
    """Fork a command for each request, until the other end of the socket is closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    for module in _PRELOADED:
        if "LAUNCHER_GPU_TESTS" in os.environ and "deepspeed" in module:
            continue  # it would look for GPUs, after which no process may be forked
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a forked command visits and copies none of these objects
    while True:
        length, files, _, _ = socket.recv_fds(stream, 4, 2)
        if not length:
            return
        length += _read_exactly(stream, 4 - len(length)) if len(length) < 4 else b""
        request = json.loads(_read_exactly(stream, int.from_bytes(length, "big")))
        pid_reader, pid_writer = os.pipe()
        intermediate = os.fork()
        if intermediate == 0:
            pid = os.fork()
            if pid:
                os.write(pid_writer, pid.to_bytes(4, "big"))
                os._exit(0)  # the test process, a subreaper, adopts the command as its child
            os.close(pid_reader)
            os.close(pid_writer)
            stream.close()
            run(request["command"], request["folder"], request["env"], files)
        os.waitpid(intermediate, 0)
        stream.sendall(os.read(pid_reader, 4))
        for descriptor in (pid_reader, pid_writer, *files):
            os.close(descriptor)


def run(command: list[str], folder: str, env: dict[str, str], files: list[int]) -> None:
    """Run a command in this process, from its first line to its exit code."""
    os.setsid()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run with `&`
    for number, file in zip((1, 2), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]  # spawned processes find the program there
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # forget the value that was cached in the server's environment
    sys.argv = list(command[Path(command[0]).name == "python" :])
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    code: object = 1
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
        code = 0
    except SystemExit as exit_request:
        code = exit_request.code
    except BaseException:  # noqa: BLE001  # printed as the interpreter would print it
        sys.excepthook(*sys.exc_info())
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code if isinstance(code, int) else 0 if code is None else 1)


if __name__ == "__main__":
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        serve(connection)
