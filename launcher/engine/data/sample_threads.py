"""Threads of one process that read the samples of a micro-batch together.

The state of the global generators of `random`, `numpy.random` and torch belongs to a process, so it
cannot be seeded for each of several samples that are read at the same time. Threads are therefore
used for samples that draw nothing from them, and every micro-batch is checked for that.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

from launcher.engine.data.fingerprint import describe, first_difference
from launcher.engine.data.open_files import moved_files, open_files
from launcher.engine.data.randomness import Generators
from launcher.printable import error_line

_CHECKS, _CHECK_SECONDS = 3, 5.0
"""How often the samples of a trial are read by threads, and the time after which that is enough."""

_READS_AT_ONCE = 4
"""How many threads at most read the same sample in a check."""

_SHORT_SLICE = 1e-5
"""Seconds after which threads take turns in a check, so that they meet in the middle of a read."""


class SampleThreads:
    """Threads that read samples; each process starts its own when it first needs them.

    Args:
        count: The number of threads, at least 2.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._pid = 0
        self._executor: ThreadPoolExecutor | None = None

    def read(self, get: Callable[[int], Any], indices: Sequence[int]) -> list[Any]:
        """Return the samples with `indices`, in their order.

        No thread reads on after the return. An exception of `get` is raised.
        """
        samples: list[Any] = [None] * len(indices)
        left = deque(enumerate(indices))

        def work() -> None:
            while left:
                try:
                    place, index = left.popleft()
                except IndexError:  # another thread was faster
                    return
                try:
                    samples[place] = get(index)
                except BaseException:
                    left.clear()
                    raise

        executor = self._started()
        tasks = [executor.submit(work) for _ in range(min(self.count, len(indices)))]
        wait(tasks)
        for task in tasks:
            task.result()
        return samples

    def find_conflict(
        self, get: Callable[[int], Any], indices: Sequence[int], samples: Sequence[Any]
    ) -> str | None:
        """Return why samples must not be read by several threads, as a clause; None if they may.

        Args:
            get: Reads the sample with an index.
            indices: A few indices.
            samples: Their samples, read by this thread one after the other.
        """
        generators, held_files = Generators(), open_files()
        expected = {index: describe(each) for index, each in zip(indices, samples, strict=True)}
        try:
            # Not the last sample, behind which the position of a file would be the same again.
            self.read(get, indices[:1])
            moved = moved_files(held_files)
            if moved:
                return f"they share the position of the file {moved[0]}, which reading moves"
            found = self._read_repeatedly(get, indices)
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # the recipe's code may raise anything
            if generators.are_untouched():
                return f"a sample raised {error_line(error)}"
            found = []
        if not generators.are_untouched():
            return (
                "samples draw random numbers from random, numpy.random or torch, whose state "
                "belongs to the process, so that it cannot be seeded for each sample"
            )
        for index, sample in found:
            differs = first_difference(expected[index], describe(sample))
            if differs is not None:
                place = f", at {differs.place}," if differs.place else ""
                return f"sample {index}{place} was {differs.one}, but {differs.other} in a thread"
        return None

    def _read_repeatedly(
        self, get: Callable[[int], Any], indices: Sequence[int]
    ) -> list[tuple[int, Any]]:
        """Return pairs of index and sample; several threads read each sample at the same time."""
        repeated = [index for index in indices for _ in range(min(self.count, _READS_AT_ONCE))]
        found: list[tuple[int, Any]] = []
        end = time.monotonic() + _CHECK_SECONDS
        with _short_slices():
            for _ in range(_CHECKS):
                found += zip(repeated, self.read(get, repeated), strict=True)
                if time.monotonic() > end:
                    break
        return found

    def _started(self) -> ThreadPoolExecutor:
        if self._executor is None or self._pid != os.getpid():  # threads do not survive a fork
            self._executor = ThreadPoolExecutor(self.count, thread_name_prefix="samples")
            self._pid = os.getpid()
        return self._executor


@contextlib.contextmanager
def _short_slices() -> Iterator[None]:
    previous = sys.getswitchinterval()
    sys.setswitchinterval(_SHORT_SLICE)
    try:
        yield
    finally:
        sys.setswitchinterval(previous)
