"""Commands that the tests fork instead of starting new interpreters behave as those would."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
from support import Commands, wait_until

ARGUMENTS = "import os, sys\nprint(sys.argv[1:], sys.stdin.read(), 'torch' in sys.modules)\n"


@pytest.mark.parametrize("command", ["python a.py x 'y z'", "python -u -m a x 'y z'"])
def test_a_shell_starts_commands_warm(run: Commands, command: str) -> None:
    """A forked command has its arguments, standard input and modules, and returns its exit code."""
    (run.folder / "a.py").write_text(f"{ARGUMENTS}sys.exit(3)\n")
    done = run("bash", "-c", f"printf in | {command}; exit $?", warm=True)
    assert done.exit_code == 3, done.stderr
    assert done.stdout == "['x', 'y z'] in True\n"
    cold = run("bash", "-c", f"printf in | {command}; exit $?")
    assert cold.exit_code == 3
    assert cold.stdout == "['x', 'y z'] in False\n"


@pytest.mark.parametrize(("name", "exit_code"), [("TERM", 143), ("KILL", 137), ("USR1", 7)])
def test_signals_reach_the_command(run: Commands, name: str, exit_code: int) -> None:
    """A forked command gets the signals of its stand-in, and dies if that is killed."""
    (run.folder / "a.py").write_text(
        "import os, signal, sys\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os._exit(7))\n"
        "os.mkfifo('never')\n"
        "with open('new', 'w') as file:\n    file.write(str(os.getpid()))\n"
        "os.rename('new', 'pid')\n"
        "open('never')\n"
    )
    script = (
        "python a.py & until [ -e pid ]; do sleep 0.02; done; "
        f"kill -{name} $!; wait $! 2> /dev/null; exit $?"
    )
    done = run("bash", "-c", script, warm=True)
    assert done.exit_code == exit_code, done.stderr
    pid = int((run.folder / "pid").read_text())
    wait_until(lambda: not _is_alive(pid))


def _is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state not in "ZX"


def test_ranks_of_torchrun_start_warm(run: Commands) -> None:
    """Ranks of torchrun are processes with torch, and a rank's exit code reaches torchrun."""
    (run.folder / "a.py").write_text(
        "import os, sys\n"
        "print(os.environ['RANK'], os.getpid(), 'torch' in sys.modules, flush=True)\n"
        "sys.exit(int(sys.argv[1]))\n"
    )
    done = run("torchrun", "--standalone", "--nproc-per-node", "2", "a.py", "0")
    assert done.exit_code == 0, done.stderr
    ranks = {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()}
    assert sorted(ranks) == ["0", "1"]
    assert len({os.getpid(), *(int(pid) for pid, _ in ranks.values())}) == 3
    assert {warm for _, warm in ranks.values()} == {"True"}
    failed = run("torchrun", "--standalone", "--nproc-per-node", "1", "a.py", "5")
    assert failed.exit_code != 0
    assert re.search(r"exitcode +: 5\b", failed.stderr)
