"""Reading samples: from requests to micro-batches, in DataLoader workers or in the rank itself."""

from __future__ import annotations

import faulthandler
import os
import signal
import traceback
import warnings
from collections.abc import Callable, Iterable, Iterator
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

from launcher.engine.processes import die_with_parent
from launcher.engine.randomness import Generators, seed_all
from launcher.engine.sampler import Request
from launcher.errors import LauncherError, RecipeError, SampleError
from launcher.plan import Plan
from launcher.recipe import Data, Recipe
from launcher.seeds import derive
from launcher.signals import STOP_SIGNALS


class MicroBatch(NamedTuple):
    """What a request is answered with."""

    batch: Any
    """The collated samples."""

    request: Request

    items: int
    """How many items the loss counts in it: samples, or what the recipe's `count` says."""

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


class Reader(Dataset[MicroBatch | SampleError]):
    """Answers requests; the data set that the DataLoader and its workers see.

    Before each `__getitem__` of a data set, the global generators of `random`, `numpy.random` and
    torch are seeded by (seed, epoch, sample), and afterwards put back, so that augmentation depends
    on nothing else. A data set's batched `__getitems__` is used where it draws no random numbers.
    """

    def __init__(self, recipe: Recipe, data: Data) -> None:
        self._data = data
        self._seed = recipe.seed
        self._count = recipe.count
        self._collate: Callable[[list[Any]], Any] = data.collate or default_collate
        self._batched = {
            "train": callable(getattr(data.train, "__getitems__", None)),
            "evaluation": callable(getattr(data.evaluation, "__getitems__", None)),
        }

    def __getitem__(self, request: Request) -> MicroBatch | SampleError:
        """Return the micro-batch, or what went wrong, as a value that crosses processes whole."""
        try:
            return self._answer(request)
        except SampleError as error:
            return error

    def _answer(self, request: Request) -> MicroBatch:
        dataset = getattr(self._data, request.split)
        if type(dataset) is TensorDataset and self._data.collate is None:
            # What collating the samples one by one would give, in one indexing operation.
            chosen = torch.tensor(request.indices)
            batch = [tensor[chosen] for tensor in dataset.tensors]
        else:
            batch = self._collate(self._read(dataset, request))
        items = 0
        if request.counts:
            items = len(request.indices) if self._count is None else int(self._count(batch))
        return MicroBatch(batch, request, items)

    def _read(self, dataset: Any, request: Request) -> list[Any]:
        before = Generators()
        try:
            if self._batched[request.split]:
                samples = _reading(request, request.indices, dataset.__getitems__, request.indices)
                if before.are_untouched():
                    return list(samples)
                # It drew random numbers for the batch as a whole, which would depend on the split.
                self._batched[request.split] = False
            samples = []
            for index in request.indices:
                seed_all(derive(self._seed, request.epoch, index))
                samples.append(_reading(request, [index], dataset.__getitem__, index))
            return samples
        finally:
            before.restore()


def micro_batches(reader: Reader, requests: Iterable[Request], plan: Plan) -> Iterator[MicroBatch]:
    """Return the micro-batches of `requests`, read ahead by the plan's workers.

    The workers start at once; without any, samples are read when they are asked for. The iterator
    raises a SampleError where the data set raised.
    """
    workers = plan.workers_per_rank
    if not workers and not plan.pin_memory:
        return map(_checked, map(reader.__getitem__, requests))
    with warnings.catch_warnings():
        # The plan has weighed workers against cores, and has told the user.
        warnings.filterwarnings("ignore", message="This DataLoader will create")
        loader = DataLoader(
            reader,
            sampler=requests,
            batch_size=None,
            collate_fn=_as_it_is,
            num_workers=workers,
            prefetch_factor=plan.prefetch_factor,
            pin_memory=plan.pin_memory,
            worker_init_fn=partial(_start_worker, os.getpid()) if workers else None,
            multiprocessing_context="fork" if workers else None,
        )
        answers = iter(loader)
    return map(_checked, answers)


def _reading(
    request: Request, indices: list[int], read: Callable[[Any], Any], argument: Any
) -> Any:
    try:
        return read(argument)
    except LauncherError:
        raise
    except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
        shown = ", ".join(map(str, indices[:8])) + (", ..." if len(indices) > 8 else "")
        raise SampleError(
            f"The {request.split} data raised {type(error).__name__} for sample {shown} "
            f"(epoch {request.epoch}): {error}\n\n{traceback.format_exc().rstrip()}"
        ) from None


def _checked(answer: MicroBatch | SampleError) -> MicroBatch:
    if isinstance(answer, SampleError):
        raise answer
    return answer


def _as_it_is(micro_batch: Any) -> Any:
    return micro_batch


def _start_worker(rank: int, _: int) -> None:
    die_with_parent(rank)
    # A job that is told to stop tells all its processes; the rank decides when, and it needs data
    # until then. SIGUSR2 is for the rank to ask where a worker hangs.
    for number in (signal.SIGINT, *STOP_SIGNALS):
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR2, file=2, all_threads=True)
