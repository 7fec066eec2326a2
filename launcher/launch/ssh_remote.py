"""The process that `--hosts` starts on another host through ssh.

    python .../launcher/__main__.py --ssh-remote FOLDER ARGUMENTS...

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

from launcher.environment.program import own_program
from launcher.signals import EXIT_BY_SIGNAL


def main(folder: str, *arguments: str) -> int:
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
