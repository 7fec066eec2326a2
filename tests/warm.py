"""Start commands warm: fork them from a server that has imported what `launcher` imports.

Importing torch takes longer than most tests. A forked command, which is a console script or a file
of Python, runs its normal code in a session, a folder and an environment of its own, with its own
output. Only its interpreter started earlier. The processes that it starts are started as ever,
unless its `sys.executable` or PATH leads to warm_client.py.
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
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from warm_client import early_variables

_PRELOADED = (
    "launcher.cli",
    "launcher.engine.worker",
    "launcher.engine.backends.accelerate",
    "launcher.engine.backends.fsdp",
    "launcher.engine.backends.deepspeed",
    "torch._dynamo",
    "torch.distributed.fsdp",
)
SCRIPTS = ("launcher", "torchrun", "accelerate", "deepspeed")
"""Console scripts that are written in Python and can start warm."""

_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36


class Warm:
    """Handle of a server process that forks commands as children of this process.

    Args:
        env: Environment of the server.
        modules: Modules that the server imports besides those of launcher. They count as memory of
            the commands, which some tests limit.
    """

    def __init__(self, env: dict[str, str], modules: tuple[str, ...] = ()) -> None:
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1)
        self.bin = _make_bin(env)
        self._socket, server_socket = socket.socketpair()
        self._lock = threading.Lock()
        with server_socket, socket.socket(socket.AF_UNIX) as listener:
            listener.bind(f"{self.bin}/socket")
            listener.listen(64)
            files = (server_socket.fileno(), listener.fileno())
            self._server = subprocess.Popen(
                [sys.executable, __file__, *map(str, files), *modules],
                pass_fds=files,
                stdin=subprocess.DEVNULL,
                env=env,
                start_new_session=True,
            )
        atexit.register(self._end)

    def start(
        self, command: list[str], folder: Path, env: dict[str, str], *, executable: str | None
    ) -> subprocess.Popen[str]:
        """Start a console script, or `python` with a file, as a child of this process.

        Its `sys.executable` is the path `executable`, unless that is None.
        """
        out, command_out = os.pipe()
        err, command_err = os.pipe()
        request = {
            "command": command,
            "folder": str(folder),
            "env": env,
            "executable": executable,
            "unbuffered": False,
            "cores": sorted(os.sched_getaffinity(0)),
        }
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
        shutil.rmtree(self.bin)


def _make_bin(env: dict[str, str]) -> Path:
    """Return a new folder with the client under the name of each program that starts warm."""
    folder = Path(tempfile.mkdtemp(prefix="warm-"))
    server = {"bin": str(Path(sys.executable).parent), "early": early_variables(env)}
    (folder / "server.json").write_text(json.dumps(server))
    client = folder / "python"
    source = Path(__file__).with_name("warm_client.py").read_text()
    client.write_text(f"#!{sys.executable} -IS\n{source}")
    client.chmod(0o755)
    for name in SCRIPTS:
        (folder / name).symlink_to(client)
    return folder


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


def serve(stream: socket.socket, listener: socket.socket, modules: list[str]) -> None:
    """Fork a command for each request, until the other end of the socket is closed."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    os.environ["DS_ACCELERATOR"] = "cpu"  # DeepSpeed reads it when it is imported
    for module in (*_PRELOADED, *modules):
        if "LAUNCHER_GPU_TESTS" in os.environ and "deepspeed" in module:
            continue  # it would look for GPUs, after which no process may be forked
        importlib.import_module(module)
    gc.collect()
    gc.freeze()  # a collection in a forked command visits and copies none of these objects
    poll = select.poll()
    poll.register(stream, select.POLLIN)
    poll.register(listener, select.POLLIN)
    while True:
        ready = [file for file, _ in poll.poll()]
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass  # a process that waited for the command of a client has ended
        if listener.fileno() in ready:
            _serve_client(stream, listener)
        if stream.fileno() in ready and not _serve_owner(stream, listener):
            return


def _serve_owner(stream: socket.socket, listener: socket.socket) -> bool:
    """Fork a command that becomes a child of the test process; return False at the end."""
    received = _receive(stream, 2)
    if received is None:
        return False
    request, files = received
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
        listener.close()
        run(request, files)
    os.waitpid(intermediate, 0)
    stream.sendall(os.read(pid_reader, 4))
    for descriptor in (pid_reader, pid_writer, *files):
        os.close(descriptor)
    return True


def _serve_client(stream: socket.socket, listener: socket.socket) -> None:
    """Fork a process that forks the command of a client and waits for its end."""
    connection, _ = listener.accept()
    if os.fork():
        connection.close()
        return
    stream.close()
    listener.close()
    received = _receive(connection, 3)
    if received is None:
        os._exit(0)
    request, files = received
    pid = os.fork()
    if pid == 0:
        connection.close()
        run(request, files)
    for file in files:
        os.close(file)
    end = os.pidfd_open(pid)
    poll = select.poll()
    poll.register(end, select.POLLIN)
    poll.register(connection, select.POLLIN)
    while end not in [file for file, _ in poll.poll()]:
        numbers = connection.recv(16)
        if not numbers:  # the client was killed
            os.kill(pid, signal.SIGKILL)
            os._exit(0)
        for number in numbers:
            os.kill(pid, number)
    with suppress(OSError):
        connection.sendall(os.waitpid(pid, 0)[1].to_bytes(4, "big"))
    os._exit(0)


def _receive(stream: socket.socket, num_files: int) -> tuple[dict[str, Any], list[int]] | None:
    """Return a request and its open files; None if the other end is closed."""
    length, files, _, _ = socket.recv_fds(stream, 4, num_files)
    if not length:
        return None
    length += _read_exactly(stream, 4 - len(length)) if len(length) < 4 else b""
    return json.loads(_read_exactly(stream, int.from_bytes(length, "big"))), files


def run(request: dict[str, Any], files: list[int]) -> None:
    """Run a command in this process, from its first line to its exit code.

    Its last streams of standard input, output and error are `files`.
    """
    command, folder, env = request["command"], request["folder"], request["env"]
    os.setsid()
    os.sched_setaffinity(0, request["cores"])
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored if the tests run with `&`
    for number, file in zip(range(3 - len(files), 3), files, strict=True):
        os.dup2(file, number)
        os.close(file)
    sys.stdout.reconfigure(line_buffering=request["unbuffered"])  # type: ignore[union-attr]
    os.chdir(folder)
    multiprocessing.process.ORIGINAL_DIR = folder  # type: ignore[attr-defined]  # spawned processes find the program there
    os.environ.clear()
    os.environ.update(env)
    tempfile.tempdir = None  # forget the value that was cached in the server's environment
    if env.get("OMP_NUM_THREADS", "").isdecimal():
        sys.modules["torch"].set_num_threads(int(env["OMP_NUM_THREADS"]))
    sys.argv = list(command[Path(command[0]).name == "python" :])
    sys.orig_argv = [sys.executable, *sys.argv]
    sys.executable = request["executable"] or sys.executable
    is_module = sys.argv[0] == "-m"
    paths = env.get("PYTHONPATH", "").split(os.pathsep)
    sys.path[1:1] = [str(Path(path).absolute()) for path in paths if path not in {"", *sys.path}]
    sys.path[0] = folder if is_module else str(Path(sys.argv[0]).resolve().parent)
    code: object = 1
    try:
        if is_module:
            module = sys.argv[1]
            del sys.argv[0]
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
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
    owner, clients = (socket.socket(fileno=int(number)) for number in sys.argv[1:3])
    serve(owner, clients, sys.argv[3:])
