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

_CHECK_BY_NVML = "PYTORCH_NVML_BASED_CUDA_CHECK"
"""If this environment variable is 1, `torch.cuda.is_available()` asks the management library for
GPUs, where that is possible, and leaves CUDA uninitialised."""

_recipe_threads: set[int] = set()
"""Kernel ids of the threads that a recipe's code has started."""

os.register_at_fork(after_in_child=_recipe_threads.clear)  # a fork copies one thread


@contextlib.contextmanager
def observed_threads() -> Iterator[None]:
    """Record the threads that are started in this context, which runs a recipe's code.

    Recipes often choose a device when they are imported. In this context, asking torch whether
    there is a GPU does not initialise CUDA if torch can find out without.
    """
    before, chosen = _thread_ids(), os.environ.get(_CHECK_BY_NVML)
    os.environ.setdefault(_CHECK_BY_NVML, "1")
    try:
        yield
    finally:
        _recipe_threads.update(_thread_ids() - before)
        if chosen is None:
            os.environ.pop(_CHECK_BY_NVML, None)


def suspect_all_threads() -> None:
    """Record every thread but the main one as the recipe's, whose file ran before this package."""
    _recipe_threads.update(_thread_ids() - {os.getpid()})


def reason_not_to_fork() -> str | None:
    """Return what the recipe did in this process that makes forks unsafe; None if nothing.

    Call it after the recipe's code has run.

    The text completes a sentence about the recipe: "started 3 threads", "initialised CUDA".
    """
    has_torch, has_threads = "torch" in sys.modules, bool(_recipe_threads & _thread_ids())
    if not (has_torch or has_threads):
        return None
    if not _cuda_survives_a_fork():
        return "initialised CUDA"
    thread_ids = sorted(_recipe_threads & _thread_ids())
    if not thread_ids:
        return None
    started = "started 1 thread" if len(thread_ids) == 1 else f"started {len(thread_ids)} threads"
    names = _thread_names(thread_ids)
    if not names:
        return f"{started} (as torch does to compute)"
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


def _cuda_survives_a_fork() -> bool:
    """Return whether a forked process can use CUDA, by forking one that exits at once.

    Only a forked process can tell: torch may have called the driver without initialising its own
    CUDA module, as where the management library is missing.

    The fork has another effect. Fork-safe libraries, for example numpy's OpenBLAS, end their
    threads before every fork and start them again when they compute. Threads that still run
    afterwards belong to libraries that do not.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns about the threads
        child = os.fork()
    if child == 0:
        is_bad = True
        with contextlib.suppress(BaseException):
            torch = sys.modules.get("torch")
            is_bad = torch is not None and torch.cuda._is_in_bad_fork()  # noqa: SLF001
        os._exit(int(is_bad))
    return os.waitpid(child, 0)[1] == 0


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
