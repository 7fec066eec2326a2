"""A run in stages, each with a larger global batch than the one before, and where its steps are.

A batch that grows while the model learns takes small, noisy steps as long as they are good enough,
and fewer, larger ones when they are not: Smith et al., "Don't Decay the Learning Rate, Increase the
Batch Size" (arXiv:1711.00489). A run without milestones has one stage.

Positions count the samples that a run consumes, from 0; position p is sample p mod N of the order
of epoch p div N. A batch ends where its epoch does.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from launcher.planning.global_batch import ceil_div


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A part of a run, up to the next stage or its end."""

    first_step: int
    batch_size: int
    """Samples per optimizer step."""


class Window(NamedTuple):
    """The samples of one step: `size` from `start` on in the order of `epoch`."""

    epoch: int
    start: int
    size: int


def make_stages(
    batch_sizes: Sequence[int],
    milestones: Sequence[float],
    *,
    samples: int | None,
    epochs: int | None,
    steps: int | None,
) -> tuple[tuple[Stage, ...], int]:
    """Return the stages of a run, and its steps in all.

    Args:
        batch_sizes: Of each stage.
        milestones: Where each but the first begins, as rising fractions of the run: of its samples
            where it is stated in epochs, of its steps where it is stated in steps.
        samples: Training samples; only epochs need them.
        epochs: Passes over them.
        steps: Steps, instead of epochs.
    """
    if steps is not None:
        starts = [0, *(round(milestone * steps) for milestone in milestones)]
        return _without_empty(starts, batch_sizes), steps
    assert samples is not None
    assert epochs is not None
    starts, position, step = [0], 0, 0
    ends = [*(round(milestone * epochs * samples) for milestone in milestones), epochs * samples]
    for end, batch_size in zip(ends, batch_sizes, strict=True):
        taken = steps_between(position, end, batch_size, samples)
        position, step = position_after(position, taken, batch_size, samples), step + taken
        starts.append(step)
    return _without_empty(starts[:-1], batch_sizes), step


def _without_empty(starts: Sequence[int], batch_sizes: Sequence[int]) -> tuple[Stage, ...]:
    """Return the stages of at least one step: of those that begin together, the last."""
    at = dict(zip(starts, batch_sizes, strict=True))
    return tuple(Stage(first_step=step, batch_size=size) for step, size in at.items())


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that `step` is in."""
    if len(stages) == 1:
        return stages[0]
    return stages[bisect.bisect_right(stages, step, key=lambda stage: stage.first_step) - 1]


def steps_between(position: int, end: int, batch_size: int, samples: int) -> int:
    """Return the steps that it takes to get from `position` to `end`, or past it."""
    if end <= position:
        return 0
    (epoch, start), (last_epoch, rest) = divmod(position, samples), divmod(end, samples)
    if epoch == last_epoch:
        return ceil_div(rest - start, batch_size)
    whole = (last_epoch - epoch - 1) * ceil_div(samples, batch_size)
    return ceil_div(samples - start, batch_size) + whole + ceil_div(rest, batch_size)


def position_after(position: int, steps: int, batch_size: int, samples: int) -> int:
    """Return the position that `steps` lead to from `position`."""
    epoch, start = divmod(position, samples)
    to_its_end = ceil_div(samples - start, batch_size)
    if steps < to_its_end:
        return position + steps * batch_size
    epochs, within = divmod(steps - to_its_end, ceil_div(samples, batch_size))
    return (epoch + 1 + epochs) * samples + within * batch_size


class Course:
    """Where in the data each step of a run is.

    Args:
        stages: Of the run.
        samples: Training samples.
    """

    def __init__(self, stages: Sequence[Stage], samples: int) -> None:
        self._stages, self._samples = stages, samples
        self._positions = {stages[0]: 0}
        for stage, following in itertools.pairwise(stages):
            steps = following.first_step - stage.first_step
            self._positions[following] = position_after(
                self._positions[stage], steps, stage.batch_size, samples
            )

    def position(self, step: int) -> int:
        """Return the samples that all steps before `step` take."""
        stage = stage_at(self._stages, step)
        return position_after(
            self._positions[stage], step - stage.first_step, stage.batch_size, self._samples
        )

    def window(self, step: int) -> Window:
        """Return the samples of `step`."""
        epoch, start = divmod(self.position(step), self._samples)
        size = min(stage_at(self._stages, step).batch_size, self._samples - start)
        return Window(epoch, start, size)


def short_batches(stages: Sequence[Stage], samples: int, total_steps: int) -> set[int]:
    """Return the sizes of the batches that the end of an epoch cuts short in a run."""
    course = Course(stages, samples)
    ends = [*(stage.first_step for stage in stages[1:]), total_steps]
    sizes = set()
    for stage, end in zip(stages, ends, strict=True):
        start = course.position(stage.first_step) % samples
        steps, to_its_end = end - stage.first_step, ceil_div(samples - start, stage.batch_size)
        if steps >= to_its_end:
            sizes.add((samples - start) % stage.batch_size)
        if steps - to_its_end >= ceil_div(samples, stage.batch_size):
            sizes.add(samples % stage.batch_size)
    return sizes - {0}


def growth_at(stages: Sequence[Stage], step: int, rule: str) -> float:
    """Return the factor by which the learning rate at `step` has grown with the batch."""
    return lr_factor(stage_at(stages, step).batch_size / stages[0].batch_size, rule)


def lr_factor(ratio: float, rule: str) -> float:
    """Return what the learning rate is multiplied by where the batch is multiplied by `ratio`.

    Linear: Goyal et al., arXiv:1706.02677. Square root: Krizhevsky, arXiv:1404.5997.

    Args:
        ratio: Of batch sizes.
        rule: `Recipe.lr_rule`.
    """
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]
