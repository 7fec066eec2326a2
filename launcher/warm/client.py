"""A command that a warm server forks: ask for it, pass signals on, end as it ends.

The process that the shell has started stays in its place, so that Ctrl-C, Ctrl-Z, `kill` and exit
codes work as ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from launcher.environment.program import own_program
from launcher.environment.terminal import TERMINAL_VARIABLE
from launcher.warm.messages import (
    MAX_DESCRIPTORS,
    ConnectionLostError,
    is_own,
    receive_message,
    send_message,
)
from launcher.warm.running_servers import stop_least_used, stop_server
from launcher.warm.socket_folder import ForeignFolderError, SocketFolder, open_socket_folder
from launcher.warm.surroundings import identity, limits

SERVER_ARGUMENT = "--warm-server"

_SECONDS_TO_ANSWER = 20.0
_SECONDS_TO_START = 120.0

_TO_GROUP = (signal.SIGINT, signal.SIGQUIT)
"""Signals that a terminal sends to all processes of a command."""

_TO_COMMAND = (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _ColdStartError(Exception):
    """The command must start as a new process; the text is a sentence, or empty."""


def run_warm(arguments: Sequence[str], say: Callable[[str], object]) -> int | None:
    """Run a command in a process that is forked from a warm server, and wait for its end.

    A server is started if there is none, and replaced if it is another version's.

    Args:
        arguments: The arguments of the command line.
        say: Receives a line for the user.

    Returns:
        The exit code of the command, or minus the signal that ended it. None if the command has not
        been started, because it must be a new process.
    """
    try:
        if reason := _reason_for_new_process():
            raise _ColdStartError(reason)  # noqa: TRY301
        with open_socket_folder() as folder:
            stream = _ask(folder, _request(arguments), say)
    except _ColdStartError as reason:
        if str(reason):
            say(f"{reason} A new process runs this command.")
        return None
    except ForeignFolderError as error:
        say(f"The warm server is not used, because {error}. A new process runs this command.")
        return None
    except (OSError, ConnectionLostError) as error:
        say(f"The warm server cannot be used: {error or 'it ended'}. A new process runs this "
            "command.")  # fmt: skip
        return None
    with stream:
        return _Command(stream, say).run()


def end_like(code: int) -> int:
    """Return an exit code for a command's end, or end by the signal that ended it."""
    if code >= 0:
        return code
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        signal.signal(-code, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {-code})
        os.kill(os.getpid(), -code)
    return 128 - code


def _reason_for_new_process() -> str:
    """Return why a fork would not be what a new process is; a text that ends in a full stop."""
    if "SLURM_JOB_ID" in os.environ:
        return "Inside a Slurm job no warm server is used: Slurm counts what belongs to the job."
    if not hasattr(os, "pidfd_open") or not sys.platform.startswith("linux"):
        return "Warm servers need Linux 5.3."
    if sys.flags.interactive or sys.gettrace() is not None:
        return "A traced or interactive interpreter uses no warm server."
    return ""


def _request(arguments: Sequence[str]) -> tuple[dict[str, Any], list[int]]:
    """Return the request for a command, and the files that it takes with it.

    Raises:
        _ColdStartError: It has too many files.
    """
    numbers = _inherited_files()
    if len(numbers) >= MAX_DESCRIPTORS:
        raise _ColdStartError(f"The command inherits {len(numbers)} open files.")
    umask = os.umask(0o077)
    os.umask(umask)
    message = {
        "kind": "run",
        "identity": identity(),
        "limits": limits(),
        "arguments": list(arguments),
        "argv": sys.argv,
        "orig_argv": sys.orig_argv,
        "path": sys.path,
        "environment": {**os.environ, **_terminal()},
        "folder": _working_folder(),
        "umask": umask,
        "numbers": numbers,
        "streams": [_stream_settings(stream) for stream in (sys.stdin, sys.stdout, sys.stderr)],
        "ignored": [int(number) for number in signal.valid_signals() if _is_ignored(number)],
        "blocked": [int(each) for each in signal.pthread_sigmask(signal.SIG_BLOCK, ())],
    }
    return message, numbers


def _ask(
    folder: SocketFolder, request: tuple[dict[str, Any], list[int]], say: Callable[[str], object]
) -> socket.socket:
    """Return a connection to a server that has accepted the command.

    Raises:
        _ColdStartError: No server can run it.
        OSError: The server cannot be reached.
        ConnectionLostError: The server ended.
    """
    name = request[0]["identity"]
    reply: dict[str, Any] = {}
    with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, ConnectionLostError):
        stream, reply = _try(folder, name, request)
        if stream is not None:
            return stream
    with folder.locked(name):  # another command may have started a server in the meantime
        with contextlib.suppress(FileNotFoundError, ConnectionRefusedError, ConnectionLostError):
            stream, reply = _try(folder, name, request)
            if stream is not None:
                return stream
        if "stale" in reply:
            say(f"{reply['stale']} changed since the warm server started: another replaces it.")
            stop_server(folder, name)
        elif folder.inode(name) is not None:
            say("The warm server had ended without a trace: another replaces it.")
        folder.remove(name)
        stop_least_used(folder)
        _start_server(name)
    stream, reply = _try(folder, name, request)
    if stream is None:
        raise _ColdStartError("The warm server that was started just now is out of date already.")
    return stream


def _try(
    folder: SocketFolder, name: str, request: tuple[dict[str, Any], list[int]]
) -> tuple[socket.socket | None, dict[str, Any]]:
    """Return a connection to a server that accepts the command, or None and what it replied.

    Raises:
        _ColdStartError: The server has other limits than this process.
        OSError: The server cannot be reached.
        ConnectionLostError: The server ended.
    """
    message, numbers = request
    stream = folder.connect(name, _SECONDS_TO_ANSWER)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stream)
        if not is_own(stream):
            raise ForeignFolderError("another user's process listens on its socket")
        working_folder = os.open(".", os.O_PATH | os.O_CLOEXEC)
        try:
            send_message(stream, message, [working_folder, *numbers])
        finally:
            os.close(working_folder)
        reply, _ = receive_message(stream)
        if "limit" in reply:
            raise _ColdStartError(
                f"The warm server is not used, because {reply['limit']} differs from this shell's."
            )
        if "accepted" not in reply:
            return None, reply
        stack.pop_all()
        return stream, reply


def _start_server(name: str) -> None:
    """Start a server and wait until it listens.

    Raises:
        _ColdStartError: It cannot serve.
    """
    ready, server_ready = os.pipe()
    environment = {key: value for key, value in os.environ.items() if key != TERMINAL_VARIABLE}
    flags = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]  # noqa: SLF001
    python, program = own_program()
    try:
        with open(os.devnull, "r+b") as nothing:  # noqa: PTH123
            subprocess.Popen(
                [python, *flags, program, SERVER_ARGUMENT, name, str(server_ready)],
                stdin=nothing,
                stdout=nothing,
                stderr=nothing,
                cwd="/",
                env=environment,
                pass_fds=[server_ready],
                start_new_session=True,
            )
        os.close(server_ready)
        text = ""
        if select.select([ready], [], [], _SECONDS_TO_START)[0]:
            text = os.read(ready, 4096).decode(errors="replace")
    finally:
        os.close(ready)
    if text != "ready":
        raise _ColdStartError(f"No warm server could be started: {text or 'it ended'}.")


class _Command:
    """A command that a server has accepted.

    Args:
        stream: The connection to its handler.
        say: Receives a line for the user.
    """

    def __init__(self, stream: socket.socket, say: Callable[[str], object]) -> None:
        self._stream = stream
        self._say = say
        self._pid = 0

    def run(self) -> int:
        """Start the command and return how it ended: its exit code, or minus a signal."""
        numbers = {*_TO_GROUP, *_TO_COMMAND, signal.SIGTSTP, signal.SIGCONT}
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)  # until they can be passed on
        try:
            send_message(self._stream, {"kind": "go"})
            reply, descriptors = receive_message(self._stream)
            self._pid = int(reply["pid"])
            for number in numbers:
                if not _is_ignored(number):
                    signal.signal(number, self._handle)
        except (OSError, ConnectionLostError):
            self._say("The warm server ended while it started this command, which did not run.")
            return 1
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        self._stream.settimeout(None)
        process = descriptors[0]
        try:
            reply, _ = receive_message(self._stream)
            return int(reply["status"])
        except (OSError, ConnectionLostError):
            select.select([process], [], [])
            self._say(
                "The process that watched this command was killed, and the command has stopped. "
                "`launcher status` shows how far its run came."
            )
            return 1
        finally:
            os.close(process)

    def _handle(self, number: int, _: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            if number == signal.SIGTSTP:
                os.killpg(self._pid, signal.SIGSTOP)  # SIGTSTP has no effect on other sessions
                os.kill(os.getpid(), signal.SIGSTOP)
            elif number == signal.SIGCONT or number in _TO_GROUP:
                os.killpg(self._pid, number)
            else:
                os.kill(self._pid, number)


def _is_ignored(number: int) -> bool:
    if number in (signal.SIGPIPE, signal.SIGXFSZ):  # by Python
        return False
    return signal.getsignal(number) is signal.SIG_IGN


def _inherited_files() -> list[int]:
    """Return the descriptors that a program started by this process would have."""
    found = []
    for entry in os.listdir("/proc/self/fd"):  # noqa: PTH208
        with contextlib.suppress(OSError):  # that of the listing itself
            if os.get_inheritable(int(entry)):
                found.append(int(entry))
    return sorted(found)


def _terminal() -> dict[str, str]:
    """Return the variable that names the terminal of this process, for a debugger."""
    for descriptor in range(3):
        with contextlib.suppress(OSError):
            return {TERMINAL_VARIABLE: f"{os.getpid()}:{os.ttyname(descriptor)}"}
    return {}


def _working_folder() -> str:
    try:
        return os.getcwd()  # noqa: PTH109
    except OSError:  # it has been removed
        return "/"


def _stream_settings(stream: Any) -> dict[str, Any]:
    """Return what `reconfigure` makes a stream encode like this one."""
    settings: dict[str, Any] = {"encoding": stream.encoding, "errors": stream.errors}
    if stream.writable():
        settings |= {
            "line_buffering": stream.line_buffering,
            "write_through": stream.write_through,
        }
    return settings
