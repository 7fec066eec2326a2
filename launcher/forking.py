"""Whether processes may be forked from this one: not after a recipe has started threads in it.

A fork copies one thread. What the others hold stays held: a parallel loop waits for OpenMP's
threads without end, and a lock of a logging thread is never released. Nor can a forked process use
CUDA where it was started before the fork. A process that is spawned imports everything itself.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import types
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

_TASKS = Path("/proc/self/task")
_NAMED = 3
"""More threads than these are counted and not named."""

_suspects: set[int] = set()
"""Threads that a recipe's code has started, by the number that the kernel gives them."""


@contextlib.contextmanager
def observed_threads() -> Iterator[None]:
    """Remember the threads that what runs in this context starts: a recipe's code."""
    before = _tasks()
    try:
        yield
    finally:
        _suspects.update(_tasks() - before)


def suspect_all_threads() -> None:
    """Take every thread but the main one for the recipe's: its file has run before our code did."""
    _suspects.update(_tasks() - {os.getpid()})


def reason_not_to_fork() -> str | None:
    """Return what a recipe has done in this process that no fork survives; None for nothing.

    It completes a sentence: "started 3 threads", "initialised CUDA".
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "initialised CUDA"
    if not _suspects & _tasks():
        return None
    _fork_once()
    left = sorted(_suspects & _tasks())
    if not left:
        return None
    count = "started 1 thread" if len(left) == 1 else f"started {len(left)} threads"
    names = _names(left)
    if not names:
        return f"{count}, as torch does to compute,"
    shown = ", ".join(names[:_NAMED]) + (", ..." if len(names) > _NAMED else "")
    return f"{count} ({shown})"


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Keep processes that are spawned in this context from importing this program's main module.

    They need nothing of it, and a script without a guard would run a second time.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _fork_once() -> None:
    """Fork a process that ends at once.

    Libraries that are safe to fork end their threads before every fork, as numpy's OpenBLAS does,
    and start them again when they compute. What runs afterwards is of those that are not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 has seen the threads too
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _tasks() -> set[int]:
    """Return the threads of this process; where there is no /proc, those of Python."""
    try:
        return {int(task.name) for task in _TASKS.iterdir()}
    except OSError:
        return {thread.native_id for thread in threading.enumerate() if thread.native_id}


def _names(tasks: Iterable[int]) -> list[str]:
    """Return the names of threads, less those that only have this program's name."""
    of_python = {thread.native_id: thread.name for thread in threading.enumerate()}
    own = _command(os.getpid())
    found = (of_python.get(task) or _command(task) for task in tasks)
    return sorted({name for name in found if name and name != own})


def _command(task: int) -> str:
    try:
        return (_TASKS / str(task) / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
