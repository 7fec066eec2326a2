"""The DataLoader workers of a rank: how they start, and what they can send to it."""

from __future__ import annotations

import contextlib
import faulthandler
import io
import multiprocessing.util
import os
import pickle
import signal
import tempfile
from collections.abc import Iterator
from multiprocessing import resource_tracker
from multiprocessing.reduction import ForkingPickler
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from launcher.engine.ranks.processes import die_with_parent
from launcher.errors import SampleError, WorldError
from launcher.signals import STOP_SIGNALS

_LONGEST_ADDRESS = 107
"""Bytes that the address of a Unix socket can have (Linux, unix(7))."""

_SOCKET_NAME = len("/pymp-xxxxxxxx/listener-xxxxxxxx")
"""What multiprocessing appends to the temporary folder."""


def start_worker(rank_pid: int, _: int) -> None:
    """Prepare this process, a DataLoader worker, to outlive signals but not its rank."""
    die_with_parent(rank_pid)
    # A job that is told to stop tells all its processes; the rank decides when, and it needs data
    # until then. SIGUSR2 is for the rank to ask where a worker hangs.
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)  # a spawned one has them held back


@contextlib.contextmanager
def signals_held() -> Iterator[None]:
    """Hold back what asks a run to stop, in this process and at first in those that it starts."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, *STOP_SIGNALS})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def remove_semaphores() -> None:
    """Remove the semaphores of spawned workers, before this process ends without a clean-up.

    A process of multiprocessing's own watches them, and would warn of those that are left.
    """
    if getattr(resource_tracker._resource_tracker, "_fd", None) is not None:  # noqa: SLF001
        multiprocessing.util._run_finalizers(0)  # type: ignore[attr-defined]  # noqa: SLF001


def is_worker() -> bool:
    """Return whether this process is a DataLoader worker."""
    return get_worker_info() is not None


def check_temporary_folder() -> None:
    """Refuse a temporary folder in which workers cannot open their sockets.

    Raises:
        WorldError: Its name is too long.
    """
    # Python 3.14 falls back to /tmp by itself.
    shortened = getattr(multiprocessing.util, "_get_base_temp_dir", None)
    folder = tempfile.gettempdir() if shortened is None else shortened(tempfile)
    length, most = len(os.fsencode(folder)), _LONGEST_ADDRESS - _SOCKET_NAME
    if length > most:
        raise WorldError(
            f"DataLoader workers send batches through sockets in the temporary folder, whose name "
            f"has {length} bytes, and at most {most} fit into the address of a socket: {folder}. "
            "Set TMPDIR to a folder with a shorter name, or use num_workers=0."
        )


def check_sendable(batch: Any, split: str) -> None:
    """Refuse a batch that a worker cannot send to its rank.

    The worker's queue pickles in a thread, which prints an error and sends nothing, so that the
    rank would wait for ever (pytorch#142884).

    Raises:
        SampleError: It cannot be pickled; the message names the type.
    """
    try:
        _DryPickler(io.BytesIO(), pickle.HIGHEST_PROTOCOL).dump(batch)
    except Exception as error:  # noqa: BLE001  # whatever the user's own types raise
        raise SampleError(
            f"A DataLoader worker cannot send a batch of the {split} data, a {_name(batch)}, to "
            f"its rank: {type(error).__name__}: {error}. Define the types of a batch at the top "
            "of a module, and keep locks, generators and open files out of it, or use "
            "num_workers=0."
        ) from None


class _DryPickler(ForkingPickler):
    """Pickles everything but tensors, which would be moved to shared memory."""

    def persistent_id(self, value: Any) -> str | None:
        """Return a name for what is left out, None for the rest."""
        if not isinstance(value, Tensor):
            return None
        if value.requires_grad and not value.is_leaf:
            raise ValueError("a tensor has a gradient function: return tensor.detach()")
        return "tensor"


def _name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"
