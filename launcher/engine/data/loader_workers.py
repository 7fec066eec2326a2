"""The DataLoader workers of a rank: how they start, and what they can send to the rank."""

from __future__ import annotations

import contextlib
import errno
import faulthandler
import io
import multiprocessing
import multiprocessing.util
import os
import pickle
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from launcher.engine.ranks.processes import die_with_parent
from launcher.errors import SampleError
from launcher.printable import error_line
from launcher.signals import STOP_SIGNALS, install

_FROM_OUTSIDE = (signal.SIGINT, *(set(STOP_SIGNALS) - {signal.SIGTERM}))
"""Stop signals that come from a terminal or a scheduler and not from the code of a data set."""


PRELOADED = ("torch", "launcher.engine.data.reader")
"""Modules that the server of worker_start=forkserver imports once for all workers."""


_MAX_OPEN_FILES = 1 << 16
"""Most files that a rank may have open after `raise_open_files`."""


_SECONDS_BETWEEN_TRIES = 1.0
"""Wait of the thread that passes descriptors, before it tries again to open one."""


def raise_open_files() -> None:
    """Let this process and its children have as many files open as they may, up to 65,536.

    A worker passes each tensor of a batch to its rank by a file descriptor. Shells often allow
    1,024 of them, and a process may raise this limit up to a second one, the hard limit.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = _MAX_OPEN_FILES if hard == resource.RLIM_INFINITY else min(hard, _MAX_OPEN_FILES)
    if soft != resource.RLIM_INFINITY and soft < most:
        with contextlib.suppress(OSError, ValueError):  # a sandbox may forbid it
            resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))


def start_worker(rank_pid: int, _: int, *, method: str = "fork") -> None:
    """Make this process, a DataLoader worker, ignore stop signals and exit with its rank.

    The limit under which `launcher find batch` tries a rank's training does not hold for its
    workers. One that ran out of memory while it starts a thread would wait for that thread forever.
    """
    if method == "forkserver":
        die_with_parent(os.getppid())
        threading.Thread(target=_die_with_rank, name="rank's end", daemon=True).start()
    else:
        die_with_parent(rank_pid)
    sys.excepthook = _show_error
    hard_limit = resource.getrlimit(resource.RLIMIT_DATA)[1]
    resource.setrlimit(resource.RLIMIT_DATA, (hard_limit, hard_limit))
    # A stop signal often reaches all processes of a job. The rank decides when to stop and needs
    # data until then. With SIGUSR2 the rank asks a hanging worker for its traceback.
    for number in _FROM_OUTSIDE:
        signal.signal(number, signal.SIG_IGN)
    # Programs and processes that the data set starts inherit what is ignored, and SIGTERM is how a
    # data set ends them. They do not inherit this handler.
    install(signal.SIGTERM, lambda *_: None)
    signal.siginterrupt(signal.SIGTERM, False)  # C code sees no EINTR
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    # `signals_held` blocked them.
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, *STOP_SIGNALS})


def _show_error(kind: type[BaseException], error: BaseException, trace: Any) -> None:
    """Show an exception as Python does, and wait where it says that too many files are open.

    The thread that passes descriptors to the rank tries again at once, for as long as the rank
    waits. It would write thousands of tracebacks per second.
    """
    sys.__excepthook__(kind, error, trace)
    if isinstance(error, OSError) and error.errno in (errno.EMFILE, errno.ENFILE):
        time.sleep(_SECONDS_BETWEEN_TRIES)


def _die_with_rank() -> None:
    """Wait until the rank has ended, which is not the parent of this process; then kill it."""
    rank = multiprocessing.parent_process()
    assert rank is not None
    rank.join()
    os.kill(os.getpid(), signal.SIGKILL)


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Block stop signals in this process and in the child processes that it starts meanwhile."""
    previous_mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous_mask)


def remove_semaphores() -> None:
    """Remove the semaphores of spawned workers, before this process exits without cleaning up.

    Otherwise multiprocessing's resource tracker would warn about leaked semaphores.
    """
    if getattr(resource_tracker._resource_tracker, "_fd", None) is not None:  # noqa: SLF001
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # noqa: SLF001


def is_worker() -> bool:
    """Return whether this process is a DataLoader worker."""
    return get_worker_info() is not None


def check_sendable(batch: Any, split: str) -> None:
    """Check that a worker can send a batch to its rank.

    The queue of a worker pickles in a thread, which prints an error and sends nothing if it fails,
    so the rank would wait forever (pytorch#142884).

    Raises:
        SampleError: The batch cannot be pickled; the message names its type.
    """
    try:
        _DryPickler(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(batch)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # user-defined types may raise anything
        raise SampleError(
            f"A DataLoader worker cannot send a batch of the {split} data, a "
            f"{_qualified_type_name(batch)}, to its rank: {error_line(error)}. Define "
            "the types of a batch at the top level of a module, and keep locks, generators and "
            "open files out of it, or use num_workers=0."
        ) from None


class _DryPickler(ForkingPickler):
    """Pickles everything except tensors, which ForkingPickler would move to shared memory."""

    def persistent_id(self, value: Any) -> str | None:
        """Return a placeholder for a tensor, and None for other values, which are pickled."""
        if not isinstance(value, Tensor):
            return None
        if value.requires_grad and not value.is_leaf:
            raise ValueError("a tensor has a gradient function: return tensor.detach()")
        return "tensor"


def _qualified_type_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
