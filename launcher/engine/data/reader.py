"""Reads the micro-batches that a rank requests, in DataLoader workers or in the rank itself."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from launcher.engine.data.bad_samples import BadSample, bad_sample, may_be_skipped
from launcher.engine.data.data_calls import (
    all_samples,
    call_for,
    collated,
    count_items,
    shown_files,
)
from launcher.engine.data.device_data import DeviceData, is_indexed
from launcher.engine.data.fingerprint import describe
from launcher.engine.data.loader_workers import (
    check_sendable,
    is_worker,
)
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.open_files import OpenFile, moved_files, open_files
from launcher.engine.data.randomness import Generators, seed_all
from launcher.engine.data.recipe_data import call_data
from launcher.engine.data.sample_threads import SampleThreads
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.data.seeds import derive
from launcher.engine.data.streams import (
    Stream,
    StreamReader,
    StreamState,
)
from launcher.errors import LauncherError, RecipeError, SampleError
from launcher.printable import (
    error_line,
    traceback_of,
)
from launcher.recipe.evaluation_sets import split_of, title_of
from launcher.recipe.recipe import Data, Recipe
from launcher.runs.job import RecipeSource

_BATCH = 1
"""Last element of the path of the seed with which a batch is collated."""

_MAX_SUBSTITUTES = 64
"""Number of samples that are tried in place of a micro-batch without any that can be read."""


class _Split(NamedTuple):
    """A data set to read from, and how its samples become a batch."""

    dataset: Any
    collate: Callable[[list[Any]], Any] | None


class Reader(Dataset[MicroBatch | LauncherError]):
    """The data set of the DataLoader, which reads the micro-batch of each request.

    Before each `__getitem__` of the recipe's data set, the global generators of `random`,
    `numpy.random` and torch are seeded by (seed, epoch, sample); afterwards their state is
    restored. Augmentation therefore depends on nothing else. Before the recipe's collate function
    they are seeded by (seed, epoch, first sample of the micro-batch). The batched `__getitems__` of
    a data set is used if it draws no random numbers, and so are `Recipe.worker_threads`.

    Args:
        recipe: The recipe.
        data: The result of the recipe's data function.
        source: The import location of the recipe, which spawned workers need; None if unknown.
        device: The device of this rank, where batches are made if the recipe has data_on_device;
            None makes them on the host.

    Raises:
        RecipeError: The data cannot lie on the device.
    """

    def __init__(
        self,
        recipe: Recipe,
        data: Data,
        source: RecipeSource | None = None,
        device: torch.device | None = None,
    ) -> None:
        self._source = source
        self._start_method = "spawn"
        self.stream: StreamReader | None = None
        """Reads the training data in this process, if it is a stream."""

        self._stream_state: StreamState | None = None
        self.held_files: dict[int, OpenFile] = {}
        """Files that the data sets have held open since their creation, by descriptor."""

        self._on_device: DeviceData | None = None
        if recipe.data_on_device and device is not None:
            self._on_device = DeviceData(data, device)
        self._set_data(recipe, data)

    def _set_data(self, recipe: Recipe, data: Data) -> None:
        self.data = data
        self._seed = recipe.seed
        self._count = recipe.count
        self._skips = recipe.bad_samples == "skip"
        self._splits = {"train": _Split(data.train, data.collate)} | {
            split_of(name): _Split(each.data, each.collate or data.collate)
            for name, each in data.evaluation_sets().items()
        }
        self._batched = {
            name: callable(getattr(split.dataset, "__getitems__", None))
            for name, split in self._splits.items()
        }
        self._lengths = {name: _length(split.dataset) for name, split in self._splits.items()}
        threads = recipe.worker_threads
        self._threads = SampleThreads(threads) if threads > 1 else None
        self._without_threads: set[str] = set()
        self._checked_threads: set[str] = set()
        self.stream = None
        if isinstance(data.train, Stream):
            self.stream = StreamReader(data.train, recipe.seed)
            if self._stream_state is not None:
                self.stream.restore(self._stream_state)
        self._checked_splits: set[str] = set()
        self._has_data = True

    def __getstate__(self) -> dict[str, Any]:
        """Return the state for a spawned worker, which creates the data sets itself."""
        return {
            "_source": self._source,
            "_start_method": self._start_method,
            "_lengths": self._lengths,
            "_stream_state": self._stream_state,
            "_on_device": None,
            "_has_data": False,
            "held_files": {},
        }

    def _create_data(self) -> None:
        """Create the data sets in this process, a spawned worker, as the rank did.

        Raises:
            RecipeError: The recipe cannot be imported, or its data function raised an exception or
                returned data sets of other lengths than in the rank.
        """
        assert self._source is not None
        generators, rank_lengths = Generators(), self._lengths
        try:
            recipe = self._source.build()
            seed_all(recipe.seed)
            self._set_data(recipe, call_data(recipe))
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001  # the recipe's code may raise anything
            is_ours = isinstance(error, LauncherError)
            details = "" if is_ours else f"\n\n{traceback_of(error).rstrip()}"
            raise RecipeError(
                f"With worker_start={self._start_method}, each DataLoader worker imports the "
                "recipe and calls its data function. In a worker, "
                f"{self._source.recipe} failed: {error_line(error)}{details}"
            ) from None
        finally:
            generators.restore()
        if self._lengths != rank_lengths:
            raise RecipeError(
                f"worker_start={self._start_method}: data() returned {_counts(self._lengths)} "
                f"samples in a DataLoader worker, but {_counts(rank_lengths)} samples in the rank. "
                "It must return the same data in every process."
            )

    def restore_stream(self, saved: StreamState) -> None:
        """Read the stream on from where a checkpoint was saved, also in later workers."""
        self._stream_state = saved
        if self.stream is not None:
            self.stream.restore(saved)

    def check_start(self, method: str) -> None:
        """Check that workers started with `method` can create the data.

        Raises:
            RecipeError: Workers are to import the recipe, and its import location is unknown.
        """
        self._start_method = method
        if method != "fork" and self._source is None:
            raise RecipeError(
                f"With worker_start={method}, each DataLoader worker imports the recipe and calls "
                "data(), but the launcher does not know where this recipe was imported from. Start "
                "it with `launcher run` or launcher.main, or use worker_start=fork."
            )

    def find_file_read_through(self, request: MicroBatchRequest) -> str | None:
        """Read a request in this process, and return a file of `held_files` that it moved.

        Returns:
            The path of a file that was opened before and whose position has changed, or None.
        """
        before = open_files()
        self[request]
        moved = moved_files({fd: before[fd] for fd in self.held_files if fd in before})
        return moved[0] if moved else None

    def __getitem__(self, request: MicroBatchRequest) -> MicroBatch | LauncherError:
        """Return the micro-batch, or the error as a value, because it must cross processes."""
        try:
            if not self._has_data:
                self._create_data()
            micro_batch = self._read(request)
            if is_worker() and request.split not in self._checked_splits:
                check_sendable(micro_batch.batch, title_of(request.split))
                self._checked_splits.add(request.split)
        except LauncherError as error:
            return error
        return micro_batch

    def _read(self, request: MicroBatchRequest) -> MicroBatch:
        (dataset, collate), descriptions = self._splits[request.split], None
        bad: list[BadSample] = []
        on_host = batch = None
        if is_indexed(dataset, collate):
            # One indexing operation gives the same result as collating the samples one by one.
            indices = torch.from_numpy(np.array(request.indices))  # faster than torch.tensor
            if self._on_device is not None:
                batch = self._on_device.batch(request.split, indices)
            if batch is None or self._count is not None:  # which would wait for a device
                on_host = [tensor[indices] for tensor in dataset.tensors]
                batch = on_host if batch is None else batch
            if request.trial:
                descriptions = _describe(request, [dataset[index] for index in request.indices])
        else:
            samples = self._read_samples(dataset, request, bad)
            if bad:
                counted = bad if request.has_weight else []
                request, samples = self._without(request, samples, bad)
                bad = counted
            if request.trial:
                descriptions = _describe(request, samples)
                self._check_threads(request, samples)
            on_host = batch = self._collate(collate, request, samples)
        note = None
        if self.stream is not None and request.split == "train":
            note = self.stream.note()
        items = 0
        if request.has_weight:
            items = len(request.indices)
            if self._count is not None:
                items = count_items(self._count, request, on_host)
        return MicroBatch(batch, request, items, descriptions, note, tuple(bad))

    def _collate(
        self, collate: Callable[[list[Any]], Any] | None, request: MicroBatchRequest, samples: Any
    ) -> Any:
        """Return the batch of the samples of a request.

        What the recipe's collate function draws, as for MixUp, depends on the seed, the epoch and
        the samples alone.

        Raises:
            SampleError: The samples cannot be joined.
        """
        if collate is None:
            return collated(collate, request, samples)
        generators = Generators()
        try:
            seed_all(derive(self._seed, request.epoch, request.indices[0], _BATCH))
            return collated(collate, request, samples)
        finally:
            generators.restore()

    def _read_samples(
        self, dataset: Any, request: MicroBatchRequest, bad: list[BadSample]
    ) -> list[Any]:
        """Return the samples of a request.

        Args:
            dataset: The data set.
            request: The request.
            bad: With bad_samples=skip, receives the samples that are left out of the result.

        Raises:
            SampleError: A sample cannot be read.
        """
        name = f"The {title_of(request.split)} data"
        generators = Generators()
        try:
            if self.stream is not None and request.split == "train":
                return self.stream.take(
                    request.epoch,
                    request.indices,
                    is_trial=request.trial,
                    has_weight=request.has_weight,
                    on_bad=functools.partial(self._leave_out, dataset, request, bad),
                )
            if self._batched[request.split]:
                try:
                    samples = call_for(
                        name,
                        request,
                        dataset.__getitems__,
                        request.indices,
                        details=functools.partial(shown_files, dataset, request.indices),
                    )
                except SampleError:
                    if not self._skips:
                        raise
                else:
                    if generators.are_untouched():
                        return all_samples(samples, request)
                    # It drew random numbers for the batch, which would depend on the split.
                    self._batched[request.split] = False
            samples = self._read_in_threads(dataset, request, generators)
            if samples is not None:
                return samples
            return self._read_one_by_one(name, dataset, request, bad)
        finally:
            generators.restore()

    def _read_in_threads(
        self, dataset: Any, request: MicroBatchRequest, generators: Generators
    ) -> list[Any] | None:
        """Return the samples of a request; None if they have to be read one by one.

        Args:
            dataset: The data set.
            request: The request.
            generators: The state of the global generators before.
        """
        if (
            self._threads is None
            or request.trial  # `_check_threads` compares with what one thread reads
            or len(request.indices) < 2
            or request.split in self._without_threads
        ):
            return None
        try:
            samples = self._threads.read(dataset.__getitem__, request.indices)
        except KeyboardInterrupt:
            raise
        except BaseException:  # noqa: BLE001  # it is read again, and then names its sample
            return None
        if generators.are_untouched():
            return samples
        # A sample drew random numbers, for which it has to be seeded.
        self._without_threads.add(request.split)
        return None

    def _check_threads(self, request: MicroBatchRequest, samples: list[Any]) -> None:
        """Check that several threads may read the samples of a trial.

        Raises:
            RecipeError: They may not; the error says why.
        """
        if self._threads is None or request.split in self._checked_threads:
            return
        self._checked_threads.add(request.split)
        conflict = self.find_thread_conflict(request, samples, self._threads)
        if conflict is not None:
            raise RecipeError(
                f"worker_threads={self._threads.count}: several threads of a process must not read "
                f"the {title_of(request.split)} data: {conflict}. Use worker_threads=1 with a "
                "larger num_workers, whose processes share nothing, or change the data set."
            )

    def reason_against_threads(
        self, request: MicroBatchRequest, threads: SampleThreads
    ) -> str | None:
        """Return why threads must not read a request, or have no effect, as a clause; or None."""
        dataset, collate = self._splits[request.split]
        if self.stream is not None and request.split == "train":
            return "the data is a stream, which one thread reads in its order"
        if is_indexed(dataset, collate):
            return "the data is tensors in memory"
        conflict = self.thread_conflict(request, threads)
        if conflict is None and self._batched[request.split]:
            return "the data set reads whole batches by its __getitems__"
        return conflict

    def thread_conflict(self, request: MicroBatchRequest, threads: SampleThreads) -> str | None:
        """Read a request, and return why threads must not read it, as a clause; or None."""
        dataset = self._splits[request.split].dataset
        try:
            samples = self._read_samples(dataset, request, [])
        except LauncherError as error:
            return str(error).partition("\n")[0]
        return self.find_thread_conflict(request, samples, threads)

    def find_thread_conflict(
        self, request: MicroBatchRequest, samples: list[Any], threads: SampleThreads
    ) -> str | None:
        """Return why threads must not read the samples of a request, as a clause, or None.

        Args:
            request: The request.
            samples: Its samples, read one after the other.
            threads: The threads.
        """
        if self._batched[request.split]:
            return None  # `__getitems__` reads them in one thread
        generators = Generators()
        try:
            get = self._splits[request.split].dataset.__getitem__
            return threads.find_conflict(get, request.indices, samples)
        finally:
            generators.restore()

    def _read_one_by_one(
        self, name: str, dataset: Any, request: MicroBatchRequest, bad: list[BadSample]
    ) -> list[Any]:
        samples = []
        for index in request.indices:
            for attempt in range(2):
                seed_all(derive(self._seed, request.epoch, index))
                try:
                    sample = call_for(
                        name,
                        request,
                        dataset.__getitem__,
                        index,
                        indices=[index],
                        details=functools.partial(shown_files, dataset, [index]),
                    )
                except SampleError as error:
                    if not self._skips:
                        raise
                    if attempt:  # the first failure may have been that of a network or a disk
                        self._leave_out(dataset, request, bad, index, error)
                    continue
                samples.append(sample)
                break
        return samples

    def _leave_out(
        self,
        dataset: Any,
        request: MicroBatchRequest,
        bad: list[BadSample],
        index: int,
        error: SampleError,
    ) -> None:
        """Leave a sample out of its batch, or raise its error."""
        if not (self._skips and may_be_skipped(error)):
            raise error
        bad.append(bad_sample(request, index, dataset, error))

    def _without(
        self, request: MicroBatchRequest, samples: list[Any], bad: list[BadSample]
    ) -> tuple[MicroBatchRequest, list[Any]]:
        """Return a request without its bad samples, and the samples to collate.

        If all are bad, others that can be read stand in for them with weight 0, because a rank must
        take part in what the others compute.

        Raises:
            SampleError: No sample can be read.
        """
        left_out = {each.sample for each in bad}
        indices = [index for index in request.indices if index not in left_out]
        if indices:
            return replace(request, indices=indices), samples
        dataset = self._splits[request.split].dataset
        tried = request.indices[0]
        for offset in range(1, _MAX_SUBSTITUTES + 1):
            if self.stream is not None and request.split == "train":
                found = self.stream.substitute(request.epoch)
            else:
                index = (tried + offset) % len(dataset)
                other = replace(request, indices=[index])
                found = self._read_samples(dataset, other, [])
            if found:
                stand_in = replace(request, indices=[tried], has_weight=False)
                return stand_in, found
        raise SampleError(
            f"No sample of the {title_of(request.split)} data could be read from sample {tried:,} "
            f"on, in {_MAX_SUBSTITUTES} attempts. The last reason: {bad[-1].reason}."
        )


def _length(dataset: Any) -> int:
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _counts(lengths: Mapping[str, int]) -> str:
    return " and ".join(f"{length:,} {title_of(split)}" for split, length in lengths.items())


def _describe(request: MicroBatchRequest, samples: list[Any]) -> dict[str, Any]:
    epoch = f" of epoch {request.epoch + 1}" if request.epoch else ""
    pairs = zip(request.indices, samples, strict=True)
    return {f"{index}{epoch}": describe(sample) for index, sample in pairs}
