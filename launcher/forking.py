"""Whether this process may fork: not after a recipe has started threads or CUDA in it.

A fork copies only the thread that calls it. In the copy, a parallel loop waits forever for OpenMP's
missing threads, and the lock of a logging thread is never released. CUDA cannot be used in a forked
process if it was initialised before the fork. A spawned process imports everything itself.
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
_MAX_NAMED = 3
"""Maximum number of threads that a message names."""

_recipe_threads: set[int] = set()
"""Kernel ids of the threads that a recipe's code has started."""


@contextlib.contextmanager
def observed_threads() -> Iterator[None]:
    """Record the threads that are started in this context, which runs a recipe's code."""
    before = _thread_ids()
    try:
        yield
    finally:
        _recipe_threads.update(_thread_ids() - before)


def suspect_all_threads() -> None:
    """Record every thread but the main one as the recipe's, whose file ran before this package."""
    _recipe_threads.update(_thread_ids() - {os.getpid()})


def reason_not_to_fork() -> str | None:
    """Return what the recipe did in this process that makes forks unsafe; None if nothing.

    The text completes a sentence about the recipe: "started 3 threads", "initialised CUDA".
    """
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_initialized():
        return "initialised CUDA"
    if not _recipe_threads & _thread_ids():
        return None
    _fork_once()
    thread_ids = sorted(_recipe_threads & _thread_ids())
    if not thread_ids:
        return None
    started = "started 1 thread" if len(thread_ids) == 1 else f"started {len(thread_ids)} threads"
    names = _thread_names(thread_ids)
    if not names:
        return f"{started}, as torch does to compute,"
    shown = ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")
    return f"{started} ({shown})"


@contextlib.contextmanager
def without_main_module() -> Iterator[None]:
    """Keep processes that are spawned in this context from importing this program's main module.

    They do not need it, and a script without a `__main__` guard would run again.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _fork_once() -> None:
    """Fork a process that exits at once, so that fork-safe libraries end their threads.

    Such libraries, for example numpy's OpenBLAS, end their threads before every fork and start them
    again when they compute. Threads that still run afterwards belong to libraries that do not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about the threads
        child = os.fork()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)


def _thread_ids() -> set[int]:
    """Return the kernel ids of this process's threads; without /proc, of Python's threads alone."""
    try:
        return {int(task.name) for task in _TASKS.iterdir()}
    except OSError:
        return {thread.native_id for thread in threading.enumerate() if thread.native_id}


def _thread_names(thread_ids: Iterable[int]) -> list[str]:
    """Return the names of threads, without those that are only the name of this program."""
    python_names = {thread.native_id: thread.name for thread in threading.enumerate()}
    program = _kernel_name(os.getpid())
    names = (python_names.get(thread_id) or _kernel_name(thread_id) for thread_id in thread_ids)
    return sorted({name for name in names if name and name != program})


def _kernel_name(thread_id: int) -> str:
    try:
        return (
            (_TASKS / str(thread_id) / "comm").read_text(encoding="utf-8", errors="replace").strip()
        )
    except OSError:
        return ""
