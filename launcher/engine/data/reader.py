"""Reading samples: from requests to micro-batches, in DataLoader workers or in the rank itself."""

from __future__ import annotations

import contextlib
import os
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.utils.data import (
    DataLoader,
    Dataset,
    IterableDataset,
    TensorDataset,
    default_collate,
)

from launcher.engine.data.fingerprint import describe
from launcher.engine.data.loader_workers import (
    check_sendable,
    check_temporary_folder,
    is_worker,
    signals_held,
    start_worker,
)
from launcher.engine.data.open_files import OpenFile, moved_files, open_files
from launcher.engine.data.randomness import Generators, seed_all
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.data.seeds import derive
from launcher.errors import LauncherError, RecipeError, SampleError
from launcher.planning.plan import Plan
from launcher.recipe.recipe import Data, Recipe
from launcher.runs.job import RecipeSource


class MicroBatch(NamedTuple):
    """What a request is answered with."""

    batch: Any
    """The collated samples."""

    request: MicroBatchRequest

    items: int
    """How many items the loss counts in it: samples, or what the recipe's `count` says."""

    samples: dict[str, Any] | None = None
    """Descriptions of the samples by their numbers, in a trial."""

    @property
    def counts(self) -> bool:
        """Whether it has a weight in its step."""
        return self.request.counts


def sample_count(data: Any, split: str) -> int:
    """Return the number of samples of a data set.

    Raises:
        RecipeError: It has no length, cannot be indexed, or is empty.
    """
    if isinstance(data, IterableDataset):
        raise RecipeError(
            f"The {split} data is a {type(data).__name__}, an iterable data set: its samples have "
            "no numbers, so that neither what each rank takes nor where a run goes on could be "
            "exact. Give a data set with __len__ and __getitem__; launcher.Shards reads samples "
            "out of tar files in any order."
        )
    if isinstance(data, Mapping) and 0 not in data:
        names = ", ".join(map(repr, list(data)[:4]))
        raise RecipeError(
            f"The {split} data is a {type(data).__name__} with the keys {names}; expected one data "
            "set, whose samples are numbered from 0. Join several with "
            "torch.utils.data.ConcatDataset."
        )
    if not hasattr(data, "__getitem__") or not hasattr(data, "__len__"):
        raise RecipeError(
            f"The {split} data is a {type(data).__name__}, which has no "
            f"{'length' if hasattr(data, '__getitem__') else '__getitem__'}: samples could not be "
            "shared exactly over ranks. Give a map-style data set, with __len__ and __getitem__."
        )
    if len(data) == 0:
        raise RecipeError(
            f"The {split} data is empty: len() of the {type(data).__name__} is 0. "
            "Look at what the recipe's data function reads."
        )
    return len(data)


class Reader(Dataset[MicroBatch | LauncherError]):
    """Answers requests; the data set that the DataLoader and its workers see.

    Before each `__getitem__` of a data set, the global generators of `random`, `numpy.random` and
    torch are seeded by (seed, epoch, sample), and afterwards put back, so that augmentation depends
    on nothing else. A data set's batched `__getitems__` is used where it draws no random numbers.
    """

    def __init__(self, recipe: Recipe, data: Data, source: RecipeSource | None = None) -> None:
        self._source = source
        self.held_files: dict[int, OpenFile] = {}
        """Files that the data sets have held open since they were made."""

        self._fill(recipe, data)

    def _fill(self, recipe: Recipe, data: Data) -> None:
        self.data = data
        self._seed = recipe.seed
        self._count = recipe.count
        self._collate: Callable[[list[Any]], Any] = data.collate or default_collate
        self._batched = {
            "train": callable(getattr(data.train, "__getitems__", None)),
            "evaluation": callable(getattr(data.evaluation, "__getitems__", None)),
        }
        self._lengths = [_length(data.train), _length(data.evaluation)]
        self._sent: set[str] = set()
        self._is_filled = True

    def __getstate__(self) -> dict[str, Any]:
        """Return what a spawned worker makes the data anew from; data sets are not sent."""
        return {
            "_source": self._source,
            "_lengths": self._lengths,
            "_is_filled": False,
            "held_files": {},
        }

    def _make_anew(self) -> None:
        """Call the recipe's data() in this process, a spawned worker, as the rank has done.

        Raises:
            RecipeError: It cannot be imported, or its data() raised or returned other lengths.
        """
        assert self._source is not None
        before, expected = Generators(), self._lengths
        try:
            recipe = self._source.build()
            seed_all(recipe.seed)
            self._fill(recipe, recipe.data())
        except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
            own = isinstance(error, LauncherError)
            place = "" if own else f"\n\n{traceback.format_exc().rstrip()}"
            raise RecipeError(
                "worker_start=spawn: a DataLoader worker imports the recipe and calls data(), and "
                f"{self._source.recipe} failed there: {type(error).__name__}: {error}{place}"
            ) from None
        finally:
            before.restore()
        if self._lengths != expected:
            raise RecipeError(
                f"worker_start=spawn: data() returned {self._lengths[0]:,} training and "
                f"{self._lengths[1]:,} evaluation samples in a DataLoader worker, and "
                f"{expected[0]:,} and {expected[1]:,} in the rank. It must return the same in "
                "every process."
            )

    def check_start(self, method: str) -> None:
        """Refuse to spawn workers that could not make the data anew.

        Raises:
            RecipeError: It is not known where the recipe comes from.
        """
        if method == "spawn" and self._source is None:
            raise RecipeError(
                "worker_start=spawn has each DataLoader worker import the recipe and call data(), "
                "and where this recipe was imported from is not known. Start it with `launcher "
                "run` or launcher.main, or use worker_start=fork."
            )

    def path_read_through(self, request: MicroBatchRequest) -> str | None:
        """Read in this process; return the file of `held_files` that this moves, if any."""
        before = open_files()
        self[request]
        moved = moved_files({fd: before[fd] for fd in self.held_files if fd in before})
        return moved[0] if moved else None

    def __getitem__(self, request: MicroBatchRequest) -> MicroBatch | LauncherError:
        """Return the micro-batch, or what went wrong, as a value that crosses processes whole."""
        try:
            if not self._is_filled:
                self._make_anew()
            answer = self._answer(request)
            if is_worker() and request.split not in self._sent:
                check_sendable(answer.batch, request.split)
                self._sent.add(request.split)
        except LauncherError as error:
            return error
        return answer

    def _answer(self, request: MicroBatchRequest) -> MicroBatch:
        dataset, described = getattr(self.data, request.split), None
        if type(dataset) is TensorDataset and self.data.collate is None:
            # What collating the samples one by one would give, in one indexing operation.
            chosen = torch.tensor(request.indices)
            batch = [tensor[chosen] for tensor in dataset.tensors]
            if request.trial:
                described = _describe(request, [dataset[index] for index in request.indices])
        else:
            samples = self._read(dataset, request)
            if request.trial:
                described = _describe(request, samples)
            batch = _calling(
                f"The collate function, of the {request.split} data,",
                request,
                self._collate,
                samples,
            )
        items = 0
        if request.counts:
            items = len(request.indices)
            if self._count is not None:
                items = int(_calling("The recipe's count function", request, self._count, batch))
        return MicroBatch(batch, request, items, described)

    def _read(self, dataset: Any, request: MicroBatchRequest) -> list[Any]:
        what = f"The {request.split} data"
        before = Generators()
        try:
            if self._batched[request.split]:
                samples = _calling(what, request, dataset.__getitems__, request.indices)
                if before.are_untouched():
                    return list(samples)
                # It drew random numbers for the batch as a whole, which would depend on the split.
                self._batched[request.split] = False
            samples = []
            for index in request.indices:
                seed_all(derive(self._seed, request.epoch, index))
                samples.append(_calling(what, request, dataset.__getitem__, index, indices=[index]))
            return samples
        finally:
            before.restore()


def micro_batches(
    reader: Reader, requests: Iterable[MicroBatchRequest], plan: Plan
) -> Iterator[MicroBatch]:
    """Return the micro-batches of `requests`, read ahead by the plan's workers.

    The workers start at once; without any, samples are read when they are asked for. The iterator
    raises a SampleError where the data set raised.

    Raises:
        WorldError: Workers cannot send anything from here.
        RecipeError: Workers are to be spawned, and it is not known where the recipe comes from.
    """
    workers = plan.workers_per_rank
    if not workers and not plan.pin_memory:
        return map(checked, map(reader.__getitem__, requests))
    answers = read_ahead(
        reader,
        requests,
        workers=workers,
        method=plan.settings["worker_start"],
        prefetch_factor=plan.prefetch_factor,
        pin_memory=plan.pin_memory,
    )
    return map(checked, answers)


def read_ahead(
    reader: Reader,
    requests: Iterable[MicroBatchRequest],
    *,
    workers: int,
    method: str,
    prefetch_factor: int | None = None,
    pin_memory: bool = False,
) -> Iterator[MicroBatch | LauncherError]:
    """Start workers that answer `requests`; return the answers in their order.

    Args:
        reader: Answers them.
        requests: What to read.
        workers: How many processes read; 0 reads in this one.
        method: How they start, `fork` or `spawn`.
        prefetch_factor: Answers that each holds ready; None without workers.
        pin_memory: Whether tensors are in page-locked memory.

    Raises:
        WorldError: Workers cannot send anything from here.
        RecipeError: Workers are to be spawned, and it is not known where the recipe comes from.
    """
    if workers:
        check_temporary_folder()
        reader.check_start(method)
    with warnings.catch_warnings():
        # The plan has weighed workers against cores, and has told the user.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            reader,
            sampler=requests,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=prefetch_factor,
            pin_memory=pin_memory,
            worker_init_fn=partial(start_worker, os.getpid()) if workers else None,
            multiprocessing_context=method if workers else None,
        )
        # A spawned worker listens to signals from the beginning, and ignores them only later.
        with signals_held() if method == "spawn" else contextlib.nullcontext():
            answers: Iterator[MicroBatch | LauncherError] = iter(loader)
    return _received(answers) if workers else answers


def _received(
    answers: Iterator[MicroBatch | LauncherError],
) -> Iterator[MicroBatch | LauncherError]:
    """Yield what workers send.

    Raises:
        RuntimeError: A worker died while its tensors were fetched from it; torch only says that of
            one that it waits for.
    """
    while True:
        try:
            answer = next(answers)
        except StopIteration:
            return
        except (EOFError, ConnectionError, FileNotFoundError) as error:
            raise RuntimeError(f"DataLoader worker exited unexpectedly ({error!r})") from error
        yield answer


def _length(dataset: Any) -> int:
    return len(dataset) if hasattr(dataset, "__len__") else 0


def _describe(request: MicroBatchRequest, samples: list[Any]) -> dict[str, Any]:
    pairs = zip(request.indices, samples, strict=True)
    return {str(index): describe(sample) for index, sample in pairs}


def _calling(
    what: str,
    request: MicroBatchRequest,
    function: Callable[[Any], Any],
    argument: Any,
    *,
    indices: list[int] | None = None,
) -> Any:
    """Call a function of the recipe's.

    Raises:
        SampleError: It raised something; the message names the samples.
    """
    try:
        return function(argument)
    except LauncherError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        asked = request.indices if indices is None else indices
        shown = ", ".join(map(str, asked[:8])) + (", ..." if len(asked) > 8 else "")
        raise SampleError(
            f"{what} raised {type(error).__name__} for sample {shown} "
            f"(epoch {request.epoch}): {error}\n\n{traceback.format_exc().rstrip()}"
        ) from None


def checked(answer: MicroBatch | LauncherError) -> MicroBatch:
    """Return the answer, or raise the error that it is."""
    if isinstance(answer, LauncherError):
        raise answer
    return answer


def _as_it_is(micro_batch: Any) -> Any:
    return micro_batch
