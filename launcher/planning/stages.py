"""Stages of a run, each with its own global batch size, and the samples of each step.

A batch that grows while the model learns takes small, noisy steps while they suffice, and fewer,
larger ones later: Smith et al., "Don't Decay the Learning Rate, Increase the Batch Size"
(arXiv:1711.00489). A run without milestones has one stage.

Positions count the samples that a run consumes, from 0. Of N training samples, position p is
sample p mod N in the order of epoch p div N. The last batch of an epoch ends with the epoch.
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
    """A part of a run with one batch size, up to the next stage or the end of the run."""

    first_step: int
    batch_size: int
    """Samples per optimizer step."""


class Window(NamedTuple):
    """The samples of one step: `size` samples from `start` on, in the order of `epoch`."""

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
    """Return the stages of a run, and its number of steps.

    Args:
        batch_sizes: The batch size of each stage.
        milestones: Where each stage but the first begins, as rising fractions of the run: of its
            samples if the run is stated in epochs, of its steps if it is stated in steps.
        samples: Training samples; None if the run is stated in steps.
        epochs: Passes over the training samples; None if the run is stated in steps.
        steps: Steps of the run; None if it is stated in epochs.
    """
    if steps is not None:
        starts = [0, *(round(milestone * steps) for milestone in milestones)]
        return _without_empty(starts, batch_sizes), steps
    assert samples is not None
    assert epochs is not None
    starts, position, step = [0], 0, 0
    ends = [*(round(milestone * epochs * samples) for milestone in milestones), epochs * samples]
    for end, batch_size in zip(ends, batch_sizes, strict=True):
        num_steps = steps_between(position, end, batch_size, samples)
        position = position_after(position, num_steps, batch_size, samples)
        step += num_steps
        starts.append(step)
    return _without_empty(starts[:-1], batch_sizes), step


def _without_empty(starts: Sequence[int], batch_sizes: Sequence[int]) -> tuple[Stage, ...]:
    """Return the stages that have steps: of several that begin at the same step, the last."""
    size_by_start = dict(zip(starts, batch_sizes, strict=True))
    return tuple(Stage(first_step=step, batch_size=size) for step, size in size_by_start.items())


def stage_at(stages: Sequence[Stage], step: int) -> Stage:
    """Return the stage that `step` belongs to."""
    if len(stages) == 1:
        return stages[0]
    return stages[bisect.bisect_right(stages, step, key=lambda stage: stage.first_step) - 1]


def steps_between(position: int, end: int, batch_size: int, samples: int) -> int:
    """Return the number of steps from `position` until `end` is reached or passed.

    Args:
        position: Position of the first step.
        end: Position to reach.
        batch_size: Samples per step.
        samples: Training samples.
    """
    if end <= position:
        return 0
    (epoch, start), (last_epoch, rest) = divmod(position, samples), divmod(end, samples)
    if epoch == last_epoch:
        return ceil_div(rest - start, batch_size)
    steps_in_full_epochs = (last_epoch - epoch - 1) * ceil_div(samples, batch_size)
    steps_in_first_epoch = ceil_div(samples - start, batch_size)
    return steps_in_first_epoch + steps_in_full_epochs + ceil_div(rest, batch_size)


def position_after(position: int, steps: int, batch_size: int, samples: int) -> int:
    """Return the position after `steps` steps from `position`.

    Args:
        position: Position of the first step.
        steps: Number of steps.
        batch_size: Samples per step.
        samples: Training samples.
    """
    epoch, start = divmod(position, samples)
    steps_in_epoch = ceil_div(samples - start, batch_size)
    if steps < steps_in_epoch:
        return position + steps * batch_size
    full_epochs, rest = divmod(steps - steps_in_epoch, ceil_div(samples, batch_size))
    return (epoch + 1 + full_epochs) * samples + rest * batch_size


class Course:
    """The positions of a run's steps in the training data.

    Args:
        stages: The stages of the run.
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
        """Return the number of samples that all steps before `step` consume."""
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
    """Return the sizes of those batches of a run that the end of an epoch cuts short.

    Args:
        stages: The stages of the run.
        samples: Training samples.
        total_steps: Steps of the run.
    """
    course = Course(stages, samples)
    ends = [*(stage.first_step for stage in stages[1:]), total_steps]
    sizes = set()
    for stage, end in zip(stages, ends, strict=True):
        start = course.position(stage.first_step) % samples
        steps = end - stage.first_step
        steps_in_first_epoch = ceil_div(samples - start, stage.batch_size)
        if steps >= steps_in_first_epoch:
            sizes.add((samples - start) % stage.batch_size)
        if steps - steps_in_first_epoch >= ceil_div(samples, stage.batch_size):
            sizes.add(samples % stage.batch_size)
    return sizes - {0}


def growth_at(stages: Sequence[Stage], step: int, rule: str) -> float:
    """Return the factor by which the learning rate at `step` has grown with the batch size.

    Args:
        stages: The stages of the run.
        step: The step, counted from 0.
        rule: `Recipe.lr_rule`.
    """
    return lr_factor(stage_at(stages, step).batch_size / stages[0].batch_size, rule)


def lr_factor(ratio: float, rule: str) -> float:
    """Return the factor of the learning rate for a ratio of batch sizes.

    Linear: Goyal et al., arXiv:1706.02677. Square root: Krizhevsky, arXiv:1404.5997.

    Args:
        ratio: The new batch size divided by the old one.
        rule: `Recipe.lr_rule`.
    """
    return {"linear": ratio, "sqrt": math.sqrt(ratio), "none": 1.0}[rule]
