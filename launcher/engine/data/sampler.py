"""Which samples this rank takes, micro-batch by micro-batch, for the whole run.

One stream of requests covers training and evaluation in the order in which the loop will ask for
them. The DataLoader's workers read ahead along it, so they never stop at the end of an epoch.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from launcher.engine.data.permutation import elements_at
from launcher.planning.global_batch import BatchSplit, Statistics, ceil_div, micro_batch
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import short_batches_of_one
from launcher.planning.stages import Course, Window

_POSITIONS_AT_ONCE = 4096
"""Positions of the order that are looked up together, to share the cost of a tensor operation."""

_GHOST_SAMPLES = 2
"""Samples of an empty micro-batch: two, because BatchNorm refuses to train on one."""


_TRIAL_SAMPLES, _TRIAL_EVALUATION_SAMPLES = 8, 2
"""Samples that are looked at before the first step, at most."""


@dataclass(frozen=True, slots=True)
class MicroBatchRequest:
    """One micro-batch that a rank asks its DataLoader for."""

    split: Literal["train", "evaluation"]
    epoch: int
    indices: list[int]
    """Samples to read, in order."""

    counts: bool
    """False for a micro-batch with weight 0, read only to take part in collectives."""

    alone: bool = False
    """Whether BatchNorm would take statistics over one sample in this micro-step."""
    trial: bool = False
    """Whether it is read before the first step, to see what the samples hold."""


@dataclass(frozen=True, kw_only=True)
class Sampler:
    """The requests of one rank.

    Each step takes the next positions of the permutation seeded by (seed, epoch), as many as the
    batch of its stage has, the same for every number of ranks. The last batch of an epoch is
    shorter where the samples do not divide. An evaluation visits each sample once, in order.
    """

    plan: Plan
    rank: int
    train_samples: int
    evaluation_samples: int = 0
    statistics: Statistics = "none"
    """What BatchNorm in the model takes statistics over. It has no micro-batch of one sample, where
    that can be avoided; where the last batch of an epoch cannot, the request says `alone`."""

    @functools.cached_property
    def _course(self) -> Course:
        return Course(self.plan.stages, self.train_samples)

    @functools.cached_property
    def _cut(self) -> BatchSplit:
        return self.plan.cut(self.statistics)

    @functools.cached_property
    def _lone_sizes(self) -> list[int]:
        return short_batches_of_one(self.plan, self.train_samples, self.statistics)

    def window(self, step: int) -> Window:
        """Return the samples that `step` takes over all ranks."""
        return self._course.window(step)

    def batch_ids(self, step: int) -> list[int]:
        """Return the samples of the whole batch of `step`, in its order."""
        epoch, start, size = self.window(step)
        whole = range(start, start + size)
        return elements_at(self.train_samples, self.plan.seed, epoch, [whole])[0]

    def samples_before(self, step: int) -> int:
        """Return the samples that all steps before `step` have taken."""
        return self._course.position(step)

    def evaluates_after(self, step: int) -> bool:
        """Return whether the evaluation data, if there is any, is visited after `step`."""
        if not self.evaluation_samples:
            return False
        done, every = step + 1, self.plan.evaluate_every
        if done == self.plan.total_steps:
            return True
        if every is not None:
            return done % every == 0
        return self._course.position(done) % self.train_samples == 0

    def micro_steps(self, step: int) -> int:
        """Return the micro-batches that each rank takes in `step`."""
        return self._cut.micro_steps(self.window(step).size)

    def evaluation_steps(self) -> int:
        """Return the micro-batches that each rank takes in an evaluation."""
        return ceil_div(self.evaluation_samples, self._evaluation_batch)

    def trial(self) -> list[MicroBatchRequest]:
        """Return requests for a few samples to look at before the first step, on every rank alike.

        They are a batch of training samples, its two halves if it has any, and some evaluation
        samples if there are any.
        """
        size = min(_TRIAL_SAMPLES, self.plan.micro_batch_size, self.train_samples)
        whole = self._some(self.train_samples, size - size % 2 or 1)
        half = len(whole) // 2
        parts = [whole, whole[:half], whole[half:]] if half else [whole]
        requests = [MicroBatchRequest("train", 0, part, counts=False, trial=True) for part in parts]
        if self.evaluation_samples:
            few = min(_TRIAL_EVALUATION_SAMPLES, self.plan.micro_batch_size)
            held_out = self._some(self.evaluation_samples, few)
            requests.append(MicroBatchRequest("evaluation", 0, held_out, counts=False, trial=True))
        return requests

    def _some(self, samples: int, size: int) -> list[int]:
        return elements_at(samples, self.plan.seed, 0, [range(min(size, samples))])[0]

    def requests(self, first_step: int = 0) -> Iterator[MicroBatchRequest]:
        """Yield this rank's requests from `first_step` to the end of the run."""
        steps = range(first_step, self.plan.total_steps)
        together = max(_POSITIONS_AT_ONCE // max(self.plan.samples_per_rank), 1)
        for epoch, of_epoch in itertools.groupby(steps, lambda step: self.window(step).epoch):
            while some := list(itertools.islice(of_epoch, together)):
                for step, taken in zip(some, self._training(epoch, some), strict=True):
                    yield from taken
                    if self.evaluates_after(step):
                        yield from self.evaluation()

    def evaluation(self) -> Iterator[MicroBatchRequest]:
        """Yield the requests of one evaluation, as many on every rank."""
        for start in range(0, self.evaluation_samples, self._evaluation_batch):
            size = min(self._evaluation_batch, self.evaluation_samples - start)
            own = micro_batch(
                size, world_size=self.plan.world_size, rank=self.rank, micro_steps=1, micro_step=0
            )
            indices = list(range(start + own.start, start + own.stop))
            yield MicroBatchRequest("evaluation", 0, indices or [start], bool(indices))

    @property
    def _evaluation_batch(self) -> int:
        return self.plan.micro_batch_size * self.plan.world_size

    def _training(self, epoch: int, steps: list[int]) -> Iterator[list[MicroBatchRequest]]:
        """Yield the requests of each of `steps`, which lie in one epoch."""
        ranges: list[range] = []
        positions = [self._positions(step) for step in steps]
        for step, of_step in zip(steps, positions, strict=True):
            _, start, size = self.window(step)
            first = start if size >= _GHOST_SAMPLES else max(start - 1, 0)
            ghost = range(first, min(first + _GHOST_SAMPLES, self.train_samples))
            for own in of_step:
                ranges.append(range(start + own.start, start + own.stop) if own else ghost)
        found = iter(elements_at(self.train_samples, self.plan.seed, epoch, ranges))
        for step, of_step in zip(steps, positions, strict=True):
            size = self.window(step).size
            yield [
                MicroBatchRequest(
                    "train", epoch, next(found), bool(own), self._is_alone(size, number)
                )
                for number, own in enumerate(of_step)
            ]

    def _is_alone(self, size: int, micro_step: int) -> bool:
        """Return whether BatchNorm would take statistics over one sample at the end of an epoch."""
        if size not in self._lone_sizes:
            return False
        over = range(self.plan.world_size) if self.statistics == "all" else [self.rank]
        return sum(len(self._cut.positions(size, rank, micro_step)) for rank in over) == 1

    def _positions(self, step: int) -> list[range]:
        """Return the positions within the batch of `step` of each of this rank's micro-batches."""
        size = self.window(step).size
        return [
            self._cut.positions(size, self.rank, micro_step)
            for micro_step in range(self._cut.micro_steps(size))
        ]
