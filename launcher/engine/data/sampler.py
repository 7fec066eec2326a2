"""The samples that a rank takes, micro-batch by micro-batch, for the whole run.

One stream of requests covers training and evaluation in the order in which the loop consumes them.
DataLoader workers prefetch along this stream, so they do not stop at the end of an epoch.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from launcher.engine.data.order import GlobalOrder, Order, look_up
from launcher.planning.global_batch import BatchSplit, Statistics, ceil_div, part
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import short_batches_of_one
from launcher.planning.stages import Course, Window
from launcher.planning.virtual_ranks import Part
from launcher.recipe.evaluation_sets import split_of

_POSITIONS_PER_LOOKUP = 4096
"""Number of positions looked up in one call of `look_up`, to amortise its overhead."""

_CACHED_WINDOWS, _CACHED_SIZES = 256, 16
"""Number of steps and of batch sizes whose division is remembered: the loop, and the requests that
run ahead of it, ask for each several times."""

_NUM_GHOST_SAMPLES = 2
"""Number of samples in a micro-batch of weight 0. BatchNorm cannot train on a single sample."""

_NUM_TRIAL_SAMPLES, _NUM_TRIAL_EVALUATION_SAMPLES = 8, 2
"""Maximum number of training and evaluation samples read before the first step."""


@dataclass(frozen=True, kw_only=True)
class EvaluationSchedule:
    """How many samples an evaluation set has, and when it is evaluated."""

    name: str = ""
    """The name of the set; empty if it is the only one."""

    samples: int
    """The number of its samples."""

    every: int | Literal["epoch", "end"] = "epoch"
    """Steps between evaluations; epoch evaluates after each epoch, end after the last step alone.
    Every set is evaluated after the last step."""


@dataclass(frozen=True, slots=True)
class MicroBatchRequest:
    """One micro-batch that a rank requests from its DataLoader."""

    split: str
    """The data set to read from: `train`, `evaluation` or, of several sets, `evaluation/NAME`."""

    epoch: int
    """The epoch, from which augmentation is seeded."""

    indices: list[int]
    """The indices of the samples to read, in order."""

    has_weight: bool
    """Whether the micro-batch has a weight. One of weight 0 only takes part in collectives."""

    single_sample: bool = False
    """Whether BatchNorm would compute statistics over a single sample in this micro-step."""

    ranks_with_weight: int | None = None
    """The number of ranks, the first of all, whose micro-batch in this micro-step has a weight.
    None stands for all ranks."""

    trial: bool = False
    """Whether the micro-batch is read before the first step, to inspect the samples."""

    part: Part | None = None
    """The part of the batch that the micro-batch belongs to; None without virtual ranks."""


class Horizon:
    """The end of a stream of requests, which may be brought forward while the stream is read.

    Args:
        last_step: Number of steps after which the stream ends.
    """

    def __init__(self, last_step: int) -> None:
        self.last_step = last_step
        self.requested = 0
        """Steps of which at least one request has been taken; the end cannot be before them."""


class _Span(NamedTuple):
    """A micro-batch of this rank in a batch of some size."""

    positions: range
    """Positions within the batch; empty for a micro-batch of weight 0."""

    single_sample: bool
    """Whether BatchNorm would compute statistics over a single sample in this micro-step."""

    ranks_with_weight: int | None
    """The number of ranks whose micro-batch has a weight; None for all."""

    part: Part | None


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """Generates the micro-batch requests of one rank.

    Each step takes the next positions of the order of its epoch, as many as the batch of its stage
    has, whatever the number of ranks. The last batch of an epoch is smaller if the batch size does
    not divide the number of samples. An evaluation visits each sample once, in order.
    """

    plan: Plan
    """The plan of the run."""

    rank: int
    """The data rank whose requests are generated."""

    train_samples: int
    """The number of training samples."""

    evaluations: tuple[EvaluationSchedule, ...] = ()
    """The evaluation sets, in the order in which they are evaluated."""

    order: Order | None = None
    """The order of the training samples; None is a permutation seeded by (seed, epoch)."""

    statistics: Statistics = "none"
    """The samples over which the model's BatchNorm computes statistics. Micro-batches of one sample
    are avoided; if the last batch of an epoch needs one, its request has `alone` set."""

    stream_step: int | None = None
    """Number of steps that were taken before, if the training data is a stream; None for data that
    can be read in any order."""

    @functools.cached_property
    def _order(self) -> Order:
        return self.order or GlobalOrder(self.train_samples, self.plan.seed)

    @functools.cached_property
    def _course(self) -> Course:
        return Course(self.plan.stages, self.train_samples)

    @functools.cached_property
    def _cached_window(self) -> Callable[[int], Window]:
        return functools.lru_cache(_CACHED_WINDOWS)(self._course.window)

    @functools.cached_property
    def _cached_spans(self) -> Callable[[int], tuple[_Span, ...]]:
        return functools.lru_cache(_CACHED_SIZES)(self._spans)

    @functools.cached_property
    def _split(self) -> BatchSplit:
        return self.plan.cut(self.statistics)

    @functools.cached_property
    def _single_sample_sizes(self) -> list[int]:
        return short_batches_of_one(self.plan, self.train_samples, self.statistics)

    def window(self, step: int) -> Window:
        """Return the epoch and the positions that `step` takes over all ranks."""
        return self._cached_window(step)

    def batch_ids(self, step: int) -> list[int]:
        """Return the indices of all samples in the global batch of `step`, in order."""
        epoch, start, size = self.window(step)
        positions = range(start, start + size)
        return look_up(self._order, epoch, [positions])[0]

    def samples_before(self, step: int) -> int:
        """Return the number of samples that all steps before `step` take."""
        return self._course.position(step)

    def evaluations_after(self, step: int) -> tuple[EvaluationSchedule, ...]:
        """Return the evaluation sets that are evaluated after `step`, in their order."""
        if not self.evaluations or step + 1 == self.plan.total_steps:
            return self.evaluations
        _, start, size = self.window(step)
        is_end_of_epoch = start + size == self.train_samples
        return tuple(
            schedule
            for schedule in self.evaluations
            if (schedule.every == "epoch" and is_end_of_epoch)
            or (isinstance(schedule.every, int) and (step + 1) % schedule.every == 0)
        )

    def micro_steps(self, step: int) -> int:
        """Return the number of micro-batches that each rank takes in `step`."""
        return len(self._cached_spans(self.window(step).size))

    def evaluation_steps(self, schedule: EvaluationSchedule) -> int:
        """Return the number of micro-batches that each rank takes in an evaluation of a set."""
        batches = ceil_div(schedule.samples, self._evaluation_batch)
        return batches * self.plan.distribution.rounds

    def trial(self) -> list[MicroBatchRequest]:
        """Return requests for a few samples to inspect before the first step, equal on all ranks.

        The requests are a training micro-batch, its two halves if it has at least two samples, and
        some samples of each evaluation set.
        """
        size = min(_NUM_TRIAL_SAMPLES, self.plan.micro_batch_size, self.train_samples)
        epoch, start = 0, 0
        if self.stream_step is not None:  # the next ones, because a stream is read forwards alone
            is_over = self.stream_step >= self.plan.total_steps
            epoch, start, batch_size = self.window(0 if is_over else self.stream_step)
            size = min(size, batch_size)
        samples = look_up(self._order, epoch, [range(start, start + (size - size % 2 or 1))])[0]
        half = len(samples) // 2
        pieces = [samples, samples[:half], samples[half:]] if half else [samples]
        requests = [
            MicroBatchRequest("train", epoch, piece, has_weight=False, trial=True)
            for piece in pieces
        ]
        for schedule in self.evaluations:
            size = min(_NUM_TRIAL_EVALUATION_SAMPLES, self.plan.micro_batch_size)
            held_out, split = self._first_samples(schedule.samples, size), split_of(schedule.name)
            requests.append(MicroBatchRequest(split, 0, held_out, has_weight=False, trial=True))
        return requests

    def _first_samples(self, num_samples: int, size: int) -> list[int]:
        order = GlobalOrder(num_samples, self.plan.seed)
        return look_up(order, 0, [range(min(size, num_samples))])[0]

    def requests(
        self, first_step: int = 0, horizon: Horizon | None = None
    ) -> Iterator[MicroBatchRequest]:
        """Yield this rank's requests from `first_step` to the end of the run.

        Args:
            first_step: Number of steps that were taken before.
            horizon: Where the run ends, if it may become shorter than planned.
        """
        horizon = horizon or Horizon(self.plan.total_steps)
        steps = range(first_step, self.plan.total_steps)
        steps_per_lookup = max(_POSITIONS_PER_LOOKUP // max(self.plan.samples_per_rank), 1)
        for epoch, epoch_steps in itertools.groupby(steps, lambda step: self.window(step).epoch):
            while chunk := list(itertools.islice(epoch_steps, steps_per_lookup)):
                for step, requests in zip(chunk, self._training(epoch, chunk), strict=True):
                    if step >= horizon.last_step:
                        return
                    horizon.requested = step + 1
                    yield from requests
                    is_last = step + 1 == horizon.last_step
                    yield from self.evaluation(None if is_last else self.evaluations_after(step))

    def evaluation(
        self, schedules: Iterable[EvaluationSchedule] | None = None
    ) -> Iterator[MicroBatchRequest]:
        """Yield the requests of one evaluation of some sets, the same number on every rank.

        Args:
            schedules: The sets; None stands for all of them.
        """
        for schedule in self.evaluations if schedules is None else schedules:
            yield from self._evaluation(schedule)

    def _evaluation(self, schedule: EvaluationSchedule) -> Iterator[MicroBatchRequest]:
        distribution, split = self.plan.distribution, split_of(schedule.name)
        virtual_ranks = self._padded(distribution.of_rank(self.rank))
        for start in range(0, schedule.samples, self._evaluation_batch):
            size = min(self._evaluation_batch, schedule.samples - start)
            for virtual_rank in virtual_ranks:
                positions = (
                    range(0)
                    if virtual_rank is None
                    else part(size, distribution.count, virtual_rank)
                )
                indices = list(range(start + positions.start, start + positions.stop))
                yield MicroBatchRequest(
                    split,
                    0,
                    indices or [start],
                    bool(indices),
                    part=self._part(virtual_rank, 0, 1, is_empty=not indices),
                )

    @property
    def _evaluation_batch(self) -> int:
        return self.plan.micro_batch_size * self.plan.distribution.count

    def _training(self, epoch: int, steps: list[int]) -> Iterator[list[MicroBatchRequest]]:
        """Yield the requests of each step in `steps`, which belong to one epoch."""
        ranges: list[range] = []
        windows = [self.window(step) for step in steps]
        for _, start, size in windows:
            first = start if size >= _NUM_GHOST_SAMPLES else max(start - 1, 0)
            ghost = range(first, min(first + _NUM_GHOST_SAMPLES, self.train_samples))
            for span in self._cached_spans(size):
                positions, is_ghost = span.positions, not span.positions
                ranges.append(
                    ghost if is_ghost else range(start + positions.start, start + positions.stop)
                )
        indices = iter(look_up(self._order, epoch, ranges))
        for _, _, size in windows:
            yield [
                MicroBatchRequest(
                    "train",
                    epoch,
                    next(indices),
                    bool(span.positions),
                    span.single_sample,
                    span.ranks_with_weight,
                    part=span.part,
                )
                for span in self._cached_spans(size)
            ]

    def _spans(self, size: int) -> tuple[_Span, ...]:
        """Return this rank's micro-batches of a batch of `size`, in order."""
        num_micro_steps = self._split.micro_steps(size)
        distribution = self.plan.distribution
        spans = []
        for virtual_rank in self._padded(distribution.of_rank(self.rank)):
            cuts = [
                range(0)
                if virtual_rank is None
                else self._split.positions(size, virtual_rank, micro_step)
                for micro_step in range(num_micro_steps)
            ]
            spans += [
                _Span(
                    positions,
                    self._is_alone(size, virtual_rank, micro_step),
                    self._ranks_with_weight(size, micro_step),
                    self._part(virtual_rank, micro_step, num_micro_steps, is_empty=not any(cuts)),
                )
                for micro_step, positions in enumerate(cuts)
            ]
        return tuple(spans)

    def _padded(self, virtual_ranks: range) -> list[int | None]:
        """Return the virtual ranks with None to the number that the other ranks have."""
        missing = self.plan.distribution.rounds - len(virtual_ranks)
        return [*virtual_ranks, *[None] * missing]

    def _part(
        self, virtual_rank: int | None, micro_step: int, num_micro_steps: int, *, is_empty: bool
    ) -> Part | None:
        if self.plan.virtual_ranks is None:
            return None
        return Part(virtual_rank, micro_step, micro_step == num_micro_steps - 1, is_empty)

    def _is_alone(self, size: int, virtual_rank: int | None, micro_step: int) -> bool:
        """Return whether BatchNorm would compute statistics over one sample in a short batch."""
        if size not in self._single_sample_sizes or virtual_rank is None:
            return False
        together = range(self.plan.data_ranks) if self.statistics == "all" else [virtual_rank]
        return sum(len(self._split.positions(size, rank, micro_step)) for rank in together) == 1

    def _ranks_with_weight(self, size: int, micro_step: int) -> int | None:
        """Return `MicroBatchRequest.ranks_with_weight` for a micro-step of a batch of `size`.

        The first ranks have the longer shares, so those without samples come last.
        """
        if self.plan.virtual_ranks is not None:
            return None  # BatchNorm's statistics are those of a virtual rank
        ranks = range(self.plan.data_ranks)
        num = bisect.bisect(
            ranks, 0, key=lambda rank: not self._split.positions(size, rank, micro_step)
        )
        return None if num == len(ranks) else num
