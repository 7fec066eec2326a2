"""What a process is given besides its arguments, and what of it a forked process cannot change.

A forked command must find what a new process would find. Most of it is set after the fork. Three
kinds of things cannot be:

- `identity`: what Python, the loader and the imported packages read when they start, and where the
  kernel has put the process. Servers with different identities exist beside each other.
- `limits`: limits and priorities, which may be lowered and not raised. A command with others than
  the server's starts as a new process.
- `changed_file`: the files that the server has imported. If one has changed, the server is
  replaced.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

_OF_SESSION = (
    "_ OLDPWD PWD SHLVL TERM_PROGRAM TERM_PROGRAM_VERSION TERM_SESSION_ID DISPLAY WAYLAND_DISPLAY "
    "WINDOWID STY TMUX TMUX_PANE SSH_AUTH_SOCK SSH_CLIENT SSH_CONNECTION SSH_TTY GPG_TTY PS1 "
    "PROMPT_COMMAND EDITOR VISUAL PAGER"
)
_SESSION_VARIABLES = frozenset(_OF_SESSION.split())
"""Variables that differ between terminals, and that nothing reads while it is imported."""

_RUN_PREFIXES = ("LAUNCHER_", "WANDB_", "MLFLOW_", "COMET_")
"""Beginnings of variables that are read by a run, not while packages are imported."""

_STATUS = ("Uid", "Gid", "Groups", "CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb", "NoNewPrivs",
           "Seccomp", "Seccomp_filters", "Mems_allowed_list")  # fmt: skip
"""Lines of /proc/self/status about what a process may do."""

_PACKAGE_FOLDERS = ("site-packages", "dist-packages")

_OTHER_NAME = "RLIMIT_OFILE"
"""BSD's name of RLIMIT_NOFILE."""

_LIMITS = {
    name: getattr(resource, name)
    for name in dir(resource)
    if name.startswith("RLIMIT_") and name != _OTHER_NAME
}

_LIMIT_TEXTS = {
    "RLIMIT_NOFILE": "open files (ulimit -n)",
    "RLIMIT_AS": "virtual memory (ulimit -v)",
    "RLIMIT_MEMLOCK": "locked memory (ulimit -l)",
    "RLIMIT_NPROC": "processes (ulimit -u)",
    "RLIMIT_CORE": "core files (ulimit -c)",
    "RLIMIT_STACK": "the stack (ulimit -s)",
    "RLIMIT_CPU": "CPU time (ulimit -t)",
    "RLIMIT_FSIZE": "file sizes (ulimit -f)",
}


def identity(env: Mapping[str, str] | None = None) -> str:
    """Return a name for the kind of process that this one is; processes of one kind share a server.

    Args:
        env: The environment; None is this process's.
    """
    env = os.environ if env is None else env
    first_is_of_program = not sys.flags.safe_path if hasattr(sys.flags, "safe_path") else True
    content = {
        "python": [sys.version, os.path.realpath(sys.executable), sys.prefix, sys.exec_prefix],
        "flags": [repr(sys.flags), sorted(map(str, sys._xoptions.items())), sys.warnoptions],  # noqa: SLF001
        "path": sys.path[first_is_of_program:],
        "package": str(Path(__file__).parents[1]),
        "variables": {name: value for name, value in env.items() if not _is_of_session(name)},
        "cores": sorted(os.sched_getaffinity(0)),
        "kernel": _kernel_state(),
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:20]


def limits() -> dict[str, Any]:
    """Return the limits and priorities of this process, as values that JSON keeps."""
    values: dict[str, Any] = {
        name: list(resource.getrlimit(kind)) for name, kind in _LIMITS.items()
    }
    values["nice"] = os.nice(0)
    values["scheduler"] = os.sched_getscheduler(0)
    values["oom_score_adj"] = _read("oom_score_adj")
    return values


def differing_limit(own: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return the first limit that differs, as the subject of a sentence; empty if none does."""
    for name in sorted(own.keys() | other.keys()):
        if own.get(name) != other.get(name):
            if name in _LIMITS:
                return f"the limit of {_LIMIT_TEXTS.get(name, name)}"
            return {"nice": "the nice value"}.get(name, f"the {name}")
    return ""


class ImportedFiles:
    """The files that this process has imported, as they were when it was made."""

    def __init__(self) -> None:
        self._packages = _package_times()
        self._files: dict[str, tuple[int, int] | None] = {}

    def add_imported(self) -> None:
        """Record the files of all modules that are imported now."""
        for module in list(sys.modules.values()):
            file = getattr(module, "__file__", None)
            if isinstance(file, str) and file not in self._files:
                self._files[file] = _time_and_size(file)

    def newest(self) -> int:
        """Return the time of the newest file in nanoseconds since the epoch."""
        return max((status[0] for status in self._files.values() if status), default=0)

    def changed(self) -> str:
        """Return what has changed since, as the subject of a sentence; empty if nothing has."""
        if _package_times() != self._packages:
            return "the installed packages"
        for file, status in self._files.items():
            if _time_and_size(file) != status:
                return file
        return ""


def _is_of_session(name: str) -> bool:
    return name in _SESSION_VARIABLES or name.startswith(_RUN_PREFIXES)


def _kernel_state() -> list[Any]:
    """Return what the kernel allows this process, and in which groups and namespaces it is."""
    status = dict(line.partition(":")[::2] for line in _read("status").splitlines())
    namespaces = Path("/proc/self/ns")
    links = sorted((entry.name, str(entry.readlink())) for entry in namespaces.iterdir())
    root = os.stat("/")  # noqa: PTH116
    return [
        [status.get(name) for name in _STATUS],
        _read("cgroup"),
        _read("attr/current"),
        _read("personality"),
        links,
        [root.st_dev, root.st_ino],
    ]


def _read(name: str) -> str:
    """Return a file about this process; empty if this kernel has none."""
    try:
        return (Path("/proc/self") / name).read_text(errors="replace").strip("\n\0")
    except OSError:
        return ""


def _package_times() -> dict[str, int]:
    """Return the times of the folders of installed packages and of their lists of files."""
    times: dict[str, int] = {}
    for folder in sys.path:
        if os.path.basename(folder) not in _PACKAGE_FOLDERS:  # noqa: PTH119
            continue
        try:
            times[folder] = os.stat(folder).st_mtime_ns  # noqa: PTH116
            with os.scandir(folder) as entries:
                for entry in entries:
                    if entry.name.endswith(".dist-info"):
                        record = f"{entry.path}/RECORD"
                        times[record] = (_time_and_size(record) or (0, 0))[0]
        except OSError:
            continue
    return times


def _time_and_size(file: str) -> tuple[int, int] | None:
    try:
        status = os.stat(file)  # noqa: PTH116  # several thousand files: Path would take as long again
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size
