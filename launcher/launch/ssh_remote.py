"""The process that `--hosts` starts on another machine through ssh.

    python .../launcher/__main__.py --ssh-remote FOLDER ARGUMENTS...

Its standard input is held by whoever started it. Each line there is the name of a signal for the
run; its end, as when the connection is lost, is a terminal that was closed. ssh passes on neither.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from launcher.environment.program import own_program
from launcher.signals import EXIT_BY_SIGNAL


def main(folder: str, *arguments: str) -> int:
    """Run `launcher ARGUMENTS` in `folder`; return its exit code, as a shell would."""
    try:
        os.chdir(folder)
    except OSError as error:
        print(
            f"launcher: {os.uname().nodename}: the folder {folder}: {error.strerror}. The machines "
            "of a run have its files under the same names.",
            file=sys.stderr,
        )
        return 2
    run = subprocess.Popen(
        [*own_program(), *arguments],
        stdin=subprocess.DEVNULL,
        start_new_session=True,
    )
    threading.Thread(target=_pass_on, args=[run], daemon=True).start()
    code = run.wait()
    return code if code >= 0 else EXIT_BY_SIGNAL - code


def _pass_on(run: subprocess.Popen[bytes]) -> None:
    for line in sys.stdin:
        run.send_signal(signal.Signals[line.strip()])
    run.send_signal(signal.SIGHUP)
