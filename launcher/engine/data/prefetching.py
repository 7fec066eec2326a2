"""Micro-batches that workers read ahead of the training, pinned for the copy to a GPU."""

from __future__ import annotations

import contextlib
import errno
import functools
import multiprocessing
import os
import resource
import warnings
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch._C import _remove_worker_pids
from torch.utils.data import DataLoader

from launcher.engine.backends.nested_tensors import map_tensors
from launcher.engine.data.loader_workers import (
    PRELOADED,
    raise_open_files,
    signals_held,
    start_worker,
)
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.ranks.temporary_files import (
    check_temporary_folder,
    temporary_files_beside_sockets,
)
from launcher.errors import LauncherError, RecipeError, WorldError
from launcher.planning.plan import Plan


def micro_batches(
    reader: Reader, requests: Iterable[MicroBatchRequest], plan: Plan
) -> Iterator[MicroBatch]:
    """Return the micro-batches of `requests`, prefetched by the plan's workers.

    Workers start immediately; one of them reads a stream. Without workers, a micro-batch is read
    when the iterator reaches it. The iterator raises SampleError if the data set raised an
    exception.

    Raises:
        WorldError: The path of the temporary folder is too long for the sockets of workers.
        RecipeError: Workers are to import the recipe, and its import location is unknown; or
            several threads are to read a stream.
    """
    threads = plan.settings.get("worker_threads", 1)
    if reader.stream is not None and threads > 1:
        raise RecipeError(
            f"worker_threads={threads}: the training data is a stream, which one thread reads in "
            "its order. Remove worker_threads."
        )
    workers = min(plan.workers_per_rank, plan.workers_per_rank if reader.stream is None else 1)
    if not workers:
        results = map(raise_if_error, map(reader.__getitem__, requests))
        return map(pinned, results) if plan.pin_memory else results
    prefetched = prefetch(
        reader,
        requests,
        workers=workers,
        method=plan.settings["worker_start"],
        prefetch_factor=plan.prefetch_factor,
        pin_memory=plan.pin_memory,
    )
    return map(raise_if_error, prefetched)


class _Sent:
    """A micro-batch on its way from a worker; the thread that pins calls its method for that.

    torch's own function would not find the tensors inside dataclasses.
    """

    def __init__(self, micro_batch: MicroBatch) -> None:
        self.micro_batch = micro_batch

    def pin_memory(self) -> _Sent:
        """Return the micro-batch with its tensors in page-locked memory."""
        return _Sent(pinned(self.micro_batch))


def _send(result: Any) -> _Sent | LauncherError:
    """Return what a worker sends: a micro-batch that can be pinned, or an error."""
    return result if isinstance(result, LauncherError) else _Sent(result)


def pinned(micro_batch: MicroBatch) -> MicroBatch:
    """Return a micro-batch with its CPU tensors in page-locked memory.

    Tensors that the data set has on a GPU stay there; torch's own function refuses them.
    """
    return micro_batch._replace(batch=map_tensors(_pin_tensor, micro_batch.batch, _pin_object))


def _pin_tensor(tensor: Any) -> Any:
    if tensor.device.type != "cpu":
        return tensor
    if tensor.layout is torch.jagged:
        # torch pins the values alone; the copy of the offsets would then make the host wait.
        offsets, lengths = tensor.offsets(), tensor.lengths()
        pinned_lengths = None if lengths is None else lengths.pin_memory()
        return torch.nested.nested_tensor_from_jagged(
            tensor.values().pin_memory(),
            offsets.pin_memory(),
            pinned_lengths,
            jagged_dim=tensor._ragged_idx,  # noqa: SLF001
        )
    is_dense = tensor.layout is torch.strided and not tensor.is_nested
    return tensor.pin_memory() if is_dense else tensor


def _pin_object(value: Any) -> Any:
    """Pin an object that has torch's method for it, such as PackedSequence."""
    can_be_pinned = callable(getattr(value, "pin_memory", None))
    return value.pin_memory() if can_be_pinned and not getattr(value, "is_cuda", False) else value


_BEFORE_QUEUES_CLOSE = 20
"""Priority of what runs before `multiprocessing` closes the queues of workers, which has 10."""


def prefetch(
    reader: Reader,
    requests: Iterable[MicroBatchRequest],
    *,
    workers: int,
    method: str,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> Iterator[MicroBatch | LauncherError]:
    """Start workers that read `requests`; return the micro-batches or errors in request order.

    Args:
        reader: Reads the requests.
        requests: The requests.
        workers: The number of worker processes, at least 1.
        method: How workers start: `fork`, `spawn` or `forkserver`.
        prefetch_factor: The number of micro-batches that each worker prefetches.
        pin_memory: Whether to copy tensors to page-locked memory.

    Raises:
        WorldError: The path of the temporary folder is too long for the sockets of workers, or this
            process may not have enough files open.
        RecipeError: Workers are to import the recipe, and its import location is unknown.
    """
    check_temporary_folder()
    reader.check_start(method)
    raise_open_files()
    if method == "forkserver":
        multiprocessing.get_context(method).set_forkserver_preload(list(PRELOADED))
    with warnings.catch_warnings():
        # The planner already compares workers with cores and warns the user.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            reader,
            sampler=requests,
            batch_size=None,
            collate_fn=_send,
            num_workers=workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
            worker_init_fn=functools.partial(start_worker, os.getpid(), method=method),
            multiprocessing_context=method,
        )
        # A worker would react to signals until `start_worker` makes it ignore them.
        with signals_held(), _open_files_explained():
            results: Iterator[_Sent | LauncherError] = iter(loader)
    Finalize(None, _end_workers, args=(weakref.ref(results),), exitpriority=_BEFORE_QUEUES_CLOSE)
    return _receive(results)


def _end_workers(reference: weakref.ref[Any]) -> None:
    """End the workers of a DataLoader if something refers to its iterator when this process exits.

    `multiprocessing` would send them SIGTERM, which they ignore, and wait for them forever.

    Args:
        reference: Refers to the iterator.
    """
    iterator = reference()
    if iterator is None:
        return
    iterator._shutdown_workers()  # noqa: SLF001  # as its `__del__` does
    with contextlib.suppress(ValueError):  # that has done it
        _remove_worker_pids(id(iterator))  # torch would report how they end
    for worker in iterator._workers:  # noqa: SLF001
        if worker.is_alive():  # torch does nothing where Python itself is shutting down
            worker.kill()


@contextlib.contextmanager
def _open_files_explained() -> Iterator[None]:
    """Turn an error about too many open files into one that says what to do.

    Raises:
        WorldError: The `with` block has opened more files than this process may.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EMFILE, errno.ENFILE):
            raise
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        raise WorldError(
            f"DataLoader workers need more open files than this process may have, which is {limit}:"
            " each worker takes some, and each tensor of a batch another. Raise the limit (`ulimit "
            "-n`), or set num_workers=0."
        ) from None


def _receive(
    results: Iterator[_Sent | LauncherError],
) -> Iterator[MicroBatch | LauncherError]:
    """Yield the results of workers.

    Raises:
        RuntimeError: A worker died while its tensors were fetched. torch reports the death of a
            worker only while it waits for that worker.
    """
    while True:
        try:
            with temporary_files_beside_sockets(), _open_files_explained():
                result = next(results)
        except StopIteration:
            return
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error
        yield result.micro_batch if isinstance(result, _Sent) else result


def raise_if_error(result: MicroBatch | LauncherError) -> MicroBatch:
    """Return a micro-batch, or raise the error that was read in its place."""
    if isinstance(result, LauncherError):
        raise result
    return result
