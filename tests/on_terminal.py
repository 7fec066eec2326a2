"""Run the command line with a terminal as the standard streams of its session.

python on_terminal.py TERMINAL ARGUMENTS...
"""

from __future__ import annotations

import os
import sys

if __name__ == "__main__":
    terminal = os.open(sys.argv[1], os.O_RDWR)  # the terminal of this session from now on
    for descriptor in range(3):
        os.dup2(terminal, descriptor)
    sys.stdin, sys.stdout = os.fdopen(0), os.fdopen(1, "w", buffering=1)
    sys.stderr = os.fdopen(2, "w", buffering=1)
    sys.argv = ["launcher", *sys.argv[2:]]

    from launcher.cli import main

    main()
