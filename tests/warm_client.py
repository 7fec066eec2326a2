"""Stand in for a command of Python that the server of warm.py forks.

warm.py puts this file into a folder under the names of the interpreter and of the console scripts
that start warm, so that a shell or a launcher which looks for them there finds it. It sends its
arguments, folder, environment and standard streams to the server, passes its signals on, and ends
as the forked command ends. If it is killed, so is the command. What cannot start warm, it becomes.

It starts often, so that it imports little, and not pathlib.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
from types import FrameType

_PASSED_ON = ("SIGHUP", "SIGINT", "SIGQUIT", "SIGTERM", "SIGUSR1", "SIGUSR2", "SIGCONT")


def main() -> None:
    """Have the command forked, and end with its exit code or by its signal."""
    folder, name = os.path.split(os.path.abspath(sys.argv[0]))  # noqa: PTH100
    with open(f"{folder}/server.json") as file:  # noqa: PTH123
        server = json.load(file)
    arguments = sys.argv[1:]
    if name == "python":
        while arguments[:1] in (["-u"], ["-Xfrozen_modules=off"]):
            del arguments[0]
        if not (arguments and (arguments[0] == "-m" or arguments[0].endswith(".py"))):
            server["early"] = None
    if early_variables(os.environ) != server["early"]:
        os.execv(f"{server['bin']}/{name}", [f"{server['bin']}/{name}", *sys.argv[1:]])
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(f"{folder}/socket")
        pass_signals_on(connection)
        request = {
            "command": [f"{server['bin']}/{name}", *arguments],
            "folder": os.getcwd(),  # noqa: PTH109
            "env": dict(os.environ),
            "executable": None if name == "launcher" else f"{folder}/python",
            "unbuffered": "-u" in sys.argv[1:3],
            "cores": sorted(os.sched_getaffinity(0)),
        }
        message = json.dumps(request).encode()
        socket.send_fds(connection, [len(message).to_bytes(4, "big")], [0, 1, 2])
        connection.sendall(message)
        reply = connection.recv(4)
    end_as(int.from_bytes(reply, "big") if reply else 1 << 8)


def early_variables(environment: os._Environ[str] | dict[str, str]) -> dict[str, str]:
    """Return the variables that matter before the first line runs, PYTHONPATH aside."""
    return {
        name: value
        for name, value in environment.items()
        if name.startswith("PYTHON") and name != "PYTHONPATH"
    }


def pass_signals_on(connection: socket.socket) -> None:
    """Send the number of each signal that this process gets and does not ignore."""

    def pass_on(number: int, _: FrameType | None) -> None:
        connection.send(bytes([number]))

    for name in _PASSED_ON:
        number = getattr(signal, name)
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, pass_on)


def end_as(status: int) -> None:
    """End this process as another one ended, which had this wait status."""
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        if number != signal.SIGKILL:
            signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)
    os._exit(os.WEXITSTATUS(status))


if __name__ == "__main__":
    main()
