"""The process that `--hosts` starts on another host through ssh.

    python .../launcher/__main__.py --ssh-remote KEY FOLDER ARGUMENTS...

KEY is a random word by which `--ssh-remote-state KEY` finds the process.

The launcher that started it holds its standard input open. The first line is a JSON object of
environment variables for the run. Each further line is the name of a signal for it. The end of the
input, for example because the connection was lost, acts as SIGHUP. ssh itself forwards neither
signals nor variables.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from launcher.environment.program import own_program
from launcher.signals import EXIT_BY_SIGNAL

EXIT_STOPPED, EXIT_ENDED = 3, 4
"""Exit codes of `--ssh-remote-state` for a launcher that is stopped (SIGSTOP) and for none."""

_PROC = Path("/proc")


def main(key: str, folder: str, *arguments: str) -> int:  # noqa: ARG001  # the key is found in /proc
    """Run `launcher ARGUMENTS` in `folder`; return its exit code as a shell would."""
    try:
        os.chdir(folder)
    except OSError as error:
        print(
            f"launcher: {os.uname().nodename}: cannot enter the folder {folder}: {error.strerror}. "
            "All hosts of a run need its files under the same paths.",
            file=sys.stderr,
        )
        return 2
    first_line = sys.stdin.readline()  # empty if the connection was lost
    launcher = subprocess.Popen(
        [*own_program(), *arguments],
        env={**os.environ, **json.loads(first_line or "{}")},
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    threading.Thread(target=_forward_signals, args=[launcher], daemon=True).start()
    code = launcher.wait()
    return code if code >= 0 else EXIT_BY_SIGNAL - code


def _forward_signals(launcher: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin:
        launcher.send_signal(signal.Signals[line.strip()])
    launcher.send_signal(signal.SIGHUP)


def state(key: str) -> int:
    """Return 0 if the launcher with this key is running here, `EXIT_STOPPED` or `EXIT_ENDED`.

    Where the kernel shows no processes, every launcher counts as running.
    """
    if not (_PROC / "self/stat").exists():
        return 0
    processes = dict(_processes())
    words = [b"--ssh-remote", key.encode()]
    for pid, (_, letter) in processes.items():
        if words == _words(pid)[2:4]:
            children = [its for parent, its in processes.values() if parent == pid]
            is_stopped = any(its in "Tt" for its in (letter, *children))
            return EXIT_STOPPED if is_stopped else 0
    return EXIT_ENDED


def _processes() -> Iterator[tuple[int, tuple[int, str]]]:
    """Yield the id of each process, with the id of its parent and the letter of its state."""
    for folder in _PROC.glob("[0-9]*"):
        try:
            letter, parent = (folder / "stat").read_text().rpartition(")")[2].split()[:2]
        except OSError:  # it has ended
            continue
        yield int(folder.name), (int(parent), letter)


def _words(pid: int) -> list[bytes]:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        return []
