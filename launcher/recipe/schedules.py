"""Learning-rate schedules: pure functions of (step, total_steps), independent of any optimizer.

A rule returns a `ScheduleValue`: a factor of the peak learning rate and, for rules that cycle it,
the momentum. Steps count optimizer updates from 0. The training loop writes the value of step t
into the optimizer before the backward pass of step t. No scheduler object is stepped, so none can
be stepped twice.

    one_cycle     one triangle, then annihilation (super-convergence)
    cyclical      triangles, as many as asked for
    cosine        down along half a cosine
    linear        down along a line
    constant      no change
    exponential   up by the same ratio from step to step
    multi_step    times gamma at each milestone
    wsd           up, level for most of the run, down at its end
    warmup        up along a line, then any of the above
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Concatenate, Literal, NamedTuple, ParamSpec

from launcher.errors import UsageError
from launcher.recipe.callspec import Spec, bind
from launcher.recipe.validation import Fraction, NonNegativeInt, PositiveFloat

P = ParamSpec("P")


class ScheduleValue(NamedTuple):
    """What a schedule says of one step."""

    factor: float
    """Learning rate as a fraction of the peak."""

    momentum: float | None = None
    """Momentum (SGD) or beta1 (Adam); None leaves the optimizer's own."""


@dataclass(frozen=True, repr=False)
class Schedule(Spec):
    """A rule with its arguments; made by calling a rule, such as `one_cycle()`."""

    def at(self, step: int, total_steps: int) -> ScheduleValue:
        """Return the setting of `step`, counted from 0, in a run of `total_steps`."""
        setting: ScheduleValue = self.function(step, total_steps, **dict(self.arguments))
        return setting


SCHEDULES: dict[str, Callable[..., Schedule]] = {}
"""The rules by name, as the command line and YAML files know them."""


def schedule(rule: Callable[Concatenate[int, int, P], ScheduleValue]) -> Callable[P, Schedule]:
    """Make a rule `(step, total_steps, **arguments) -> Setting` into a maker of `Schedule`s.

    The rule becomes known by its name to `schedule=...` on the command line and in YAML files.
    """

    @functools.wraps(rule)
    def make(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        made = Schedule(rule.__name__, bind(rule, args, kwargs, skip=2), rule)
        made.at(0, 1000)  # a rule refuses bad arguments when it is called
        return made

    signature = inspect.signature(rule)
    make.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[2:]
    )
    SCHEDULES[rule.__name__] = make
    return make


@schedule
def one_cycle(
    step: int,
    total_steps: int,
    *,
    pct_start: PositiveFloat = 0.45,
    div_factor: PositiveFloat = 10.0,
    final_div_factor: PositiveFloat = 1000.0,
    three_phase: bool = True,
    anneal_strategy: Literal["linear", "cos"] = "linear",
    cycle_momentum: bool = True,
    base_momentum: Fraction = 0.85,
    max_momentum: Fraction = 0.95,
) -> ScheduleValue:
    """Up to the peak and back down in equal steps, then down by orders of magnitude.

    The policy of Smith and Topin, "Super-Convergence" (arXiv:1708.07120): with the defaults the
    learning rate rises from peak / 10 over 45 % of the run, falls back over as many steps, and is
    annihilated to peak / 10,000 in the rest, while momentum does the opposite. The arguments are
    those of `torch.optim.lr_scheduler.OneCycleLR`, whose values this returns exactly.
    """
    if pct_start >= (0.5 if three_phase else 1.0):
        raise UsageError(
            f"one_cycle(pct_start={pct_start:g}): the way up takes this part of the run"
            + (
                " and the way down as much; give less than 0.5"
                if three_phase
                else "; give less than 1"
            )
        )
    initial, final = 1 / div_factor, 1 / div_factor / final_div_factor
    turn = pct_start * total_steps - 1
    end = total_steps - 1.0
    high, low = max_momentum, base_momentum
    down: tuple[tuple[float, float, float, float, float], ...]
    if three_phase:
        down = (2 * turn, 1.0, initial, low, high), (end, initial, final, high, high)
    else:
        down = ((end, 1.0, final, low, high),)
    phases = ((turn, initial, 1.0, high, low), *down)
    curve = _cosine if anneal_strategy == "cos" else _line
    start = 0.0
    for until, lr_from, lr_to, momentum_from, momentum_to in phases:
        if step <= until or until == end:
            passed = (step - start) / (until - start) if until > start else 1.0
            momentum = curve(momentum_from, momentum_to, passed) if cycle_momentum else None
            return ScheduleValue(curve(lr_from, lr_to, passed), momentum)
        start = until
    raise AssertionError("the last phase ends the run")


@schedule
def cyclical(
    step: int,
    total_steps: int,
    *,
    cycles: PositiveFloat = 4.0,
    base_factor: Fraction = 0.1,
    rising: PositiveFloat = 0.5,
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular",
    gamma: PositiveFloat = 1.0,
    cycle_momentum: bool = True,
    base_momentum: Fraction = 0.8,
    max_momentum: Fraction = 0.9,
) -> ScheduleValue:
    """Up to the peak and back down, `cycles` times over the run.

    Smith, "Cyclical Learning Rates" (arXiv:1506.01186): `triangular` keeps the peak, `triangular2`
    halves its height with every cycle, `exp_range` shrinks it by `gamma` with every step; momentum
    does the opposite. Smith's step size, half a cycle, is 2 to 10 epochs. The values are those of
    `torch.optim.lr_scheduler.CyclicLR`.

    Args:
        step: The step, from 0.
        total_steps: Steps of the run.
        cycles: How many there are.
        base_factor: Where a cycle begins and ends.
        rising: The part of a cycle that goes up, less than 1.
        mode: What becomes of the peak.
        gamma: Of `exp_range`, 1 at most.
        cycle_momentum: Whether momentum is set.
        base_momentum: At the peak.
        max_momentum: At the base.
    """
    if rising >= 1:
        raise UsageError(f"cyclical(rising={rising:g}): a part of the cycle; give less than 1")
    if gamma > 1:
        raise UsageError(f"cyclical(gamma={gamma:g}): it shrinks the cycles; give 1 at most")
    cycle, passed = divmod(step * cycles / total_steps, 1.0)
    height = passed / rising if passed <= rising else (passed - 1) / (rising - 1)
    shrunk = {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": gamma**step}[mode]
    momentum = _line(max_momentum, base_momentum, height * shrunk) if cycle_momentum else None
    return ScheduleValue(_line(base_factor, 1.0, height * shrunk), momentum)


@schedule
def cosine(step: int, total_steps: int, *, final_factor: Fraction = 0.0) -> ScheduleValue:
    """Down from the peak to `final_factor` of it along half a cosine.

    Loshchilov and Hutter, "SGDR" (arXiv:1608.03983), one cycle; CosineAnnealingLR with
    T_max = total_steps, so that the last step still moves.
    """
    return ScheduleValue(_cosine(1.0, final_factor, step / total_steps))


@schedule
def linear(step: int, total_steps: int, *, final_factor: Fraction = 0.0) -> ScheduleValue:
    """Down from the peak to `final_factor` of it along a line, reached after the last step."""
    return ScheduleValue(_line(1.0, final_factor, step / total_steps))


@schedule
def constant(step: int, total_steps: int) -> ScheduleValue:  # noqa: ARG001
    """The peak learning rate at every step."""
    return ScheduleValue(1.0)


@schedule
def exponential(
    step: int, total_steps: int, *, initial_factor: PositiveFloat = 1e-7
) -> ScheduleValue:
    """From `initial_factor` up to the peak, by the same ratio from step to step.

    What a learning-rate range test takes (Smith, arXiv:1506.01186).
    """
    last = max(total_steps - 1, 1)
    return ScheduleValue(float(initial_factor ** (1 - step / last)) if total_steps > 1 else 1.0)


@schedule
def multi_step(
    step: int,
    total_steps: int,
    *,
    milestones: tuple[float, ...] = (0.5, 0.75),
    gamma: PositiveFloat = 0.1,
) -> ScheduleValue:
    """Times `gamma` at each milestone; milestones are fractions of the run (MultiStepLR)."""
    if not all(0 <= milestone <= 1 for milestone in milestones):
        raise UsageError(
            f"multi_step(milestones={milestones}): give fractions of the run, between 0 and 1"
        )
    passed = sum(step >= milestone * total_steps for milestone in milestones)
    return ScheduleValue(gamma**passed)


@schedule
def wsd(
    step: int,
    total_steps: int,
    *,
    warmup_fraction: Fraction = 0.05,
    decay_fraction: Fraction = 0.2,
    decay: Literal["linear", "sqrt", "cos"] = "linear",
    final_factor: Fraction = 0.0,
) -> ScheduleValue:
    """Warm-up, stable, decay: up along a line, level, and down in the last part of the run.

    Hu et al., "MiniCPM" (arXiv:2404.06395); `decay="sqrt"` is 1 - sqrt(passed), which Hägele et
    al. (arXiv:2405.18392) found the best for language models. What was trained on the level can be
    trained on, and decayed later.
    """
    if warmup_fraction + decay_fraction > 1:
        raise UsageError(
            f"wsd(warmup_fraction={warmup_fraction:g}, decay_fraction={decay_fraction:g}): the way "
            "up and the way down are parts of the run; together they are 1 at most"
        )
    rising = round(warmup_fraction * total_steps)
    falling = round(decay_fraction * total_steps)
    if step < rising:
        return ScheduleValue((step + 1) / (rising + 1))
    begins = total_steps - falling
    if step <= begins:
        return ScheduleValue(1.0)
    passed = (step - begins) / falling
    if decay == "cos":
        return ScheduleValue(_cosine(1.0, final_factor, passed))
    return ScheduleValue(_line(1.0, final_factor, math.sqrt(passed) if decay == "sqrt" else passed))


@schedule
def warmup(
    step: int,
    total_steps: int,
    then: Schedule,
    *,
    fraction: Fraction = 0.05,
    steps: NonNegativeInt | None = None,
    start_factor: Fraction = 0.01,
) -> ScheduleValue:
    """Up along a line to where `then` begins, which has the rest of the run.

    Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677), warm up over 5 epochs from
    the unscaled learning rate: `start_factor` is then lr_batch_size / batch_size.

    Args:
        step: The step, from 0.
        total_steps: Steps of the run, the warm-up included.
        then: The schedule that follows.
        fraction: Part of the run that the warm-up takes.
        steps: Steps that the warm-up takes, instead of `fraction`.
        start_factor: Factor of step 0.
    """
    if not isinstance(then, Schedule):
        raise UsageError(f"warmup(then={then!r}): give a schedule, such as warmup(cosine())")
    rising = min(steps if steps is not None else round(fraction * total_steps), total_steps - 1)
    peak = then.at(max(step - rising, 0), max(total_steps - rising, 1))
    if step >= rising:
        return peak
    return ScheduleValue(_line(start_factor, peak.factor, step / rising), peak.momentum)


def _line(start: float, end: float, passed: float) -> float:
    return (end - start) * passed + start


def _cosine(start: float, end: float, passed: float) -> float:
    return end + (start - end) / 2.0 * (1 + math.cos(math.pi * passed))
