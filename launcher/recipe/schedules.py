"""Learning-rate schedules: pure functions of (step, total_steps), independent of any optimizer.

A rule returns a `ScheduleValue`: a factor of the peak learning rate and, if the rule cycles it, the
momentum. Steps count optimizer updates from 0. The training loop writes the value of step t into
the optimizer before the backward pass of step t. No scheduler object is stepped, so none can be
stepped twice.

    one_cycle     one triangle, then annihilation (super-convergence)
    cyclical      several triangles
    cosine        decay along half a cosine
    linear        linear decay
    constant      the peak throughout
    exponential   exponential growth, for learning-rate range tests
    multi_step    a factor of gamma at each milestone
    wsd           warm-up, a stable phase, and decay
    warmup        linear warm-up, then any of the above

`launcher.recipe.unplanned_schedules` adds those that only a run can compute.
"""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Concatenate, Literal, NamedTuple, ParamSpec

from launcher.errors import UsageError
from launcher.recipe.callspec import Spec, bind
from launcher.recipe.validation import Fraction, NonNegativeInt, PositiveFloat

P = ParamSpec("P")


class ScheduleValue(NamedTuple):
    """The hyper-parameters that a schedule sets for one step."""

    factor: float
    """Learning rate as a fraction of the peak."""

    momentum: float | None = None
    """Momentum (SGD) or beta1 (Adam); None keeps the optimizer's own value."""


@dataclass(frozen=True, repr=False)
class Schedule(Spec):
    """A rule with its arguments, as a call such as `one_cycle()` returns it."""

    example: ClassVar[str] = "cosine()"

    def at(self, step: int, total_steps: int) -> ScheduleValue:
        """Return the value at `step`, counted from 0, in a run of `total_steps` steps."""
        value: ScheduleValue = self.function(step, total_steps, **dict(self.arguments))
        return value

    @property
    def is_planned(self) -> bool:
        """Whether the values can be computed before the run, as a plan shows them."""
        return all(part.is_planned for part in self.parts)

    @property
    def parts(self) -> tuple[Schedule, ...]:
        """The schedules among the arguments."""
        return tuple(value for _, value in self.arguments if isinstance(value, Schedule))

    def check_within(self, call: str) -> None:
        """Refuse to be the argument of another schedule, if that makes no sense.

        Raises:
            UsageError: It makes no sense.
        """


SCHEDULES: dict[str, Callable[..., Schedule]] = {}
"""The rules by the names that the command line and YAML files use."""


def schedule(rule: Callable[Concatenate[int, int, P], ScheduleValue]) -> Callable[P, Schedule]:
    """Turn a rule `(step, total_steps, **arguments) -> ScheduleValue` into a maker of `Schedule`s.

    The decorator registers the rule, so that `schedule=NAME(...)` works on the command line and in
    YAML files. A schedule with arguments that the rule refuses is refused when it is made.
    """

    @functools.wraps(rule)
    def make(*args: P.args, **kwargs: P.kwargs) -> Schedule:
        instance = Schedule(rule.__name__, bind(rule, args, kwargs, skip=2), rule)
        for part in instance.parts:
            part.check_within(rule.__name__)
        if instance.is_planned:
            instance.at(0, 1000)  # rules check their arguments when they are called
        return instance

    signature = inspect.signature(rule)
    make.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=list(signature.parameters.values())[2:]
    )
    SCHEDULES[rule.__name__] = make
    return make


def hint_for_function(value: object) -> str:
    """Return how a function in place of a schedule becomes one, as a sentence after a space."""
    name = getattr(value, "__name__", "")
    if any(value is make for make in SCHEDULES.values()):
        return f" Call it: {name}()."
    if inspect.isfunction(value):
        return (
            " A function (step, total_steps, ...) -> ScheduleValue becomes one by the decorator "
            "launcher.schedule, and is then called."
        )
    return ""


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
    """Rise to the peak and fall back in equal times, then decay by orders of magnitude.

    This is the policy of Smith and Topin, "Super-Convergence" (arXiv:1708.07120). With the defaults
    the learning rate rises from peak / 10 over 45 % of the run, falls back over as many steps, and
    is annihilated to peak / 10,000 in the rest; momentum moves in the opposite direction. The
    arguments and values are those of `torch.optim.lr_scheduler.OneCycleLR`.
    """
    if pct_start >= (0.5 if three_phase else 1.0):
        raise UsageError(
            f"one_cycle(pct_start={pct_start:g}): this is the part of the run that the rise takes"
            + (
                ", and the fall takes as much; give less than 0.5"
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
            progress = (step - start) / (until - start) if until > start else 1.0
            momentum = curve(momentum_from, momentum_to, progress) if cycle_momentum else None
            return ScheduleValue(curve(lr_from, lr_to, progress), momentum)
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
    """Rise to the peak and fall back, `cycles` times over the run.

    Smith, "Cyclical Learning Rates" (arXiv:1506.01186): `triangular` keeps the peak, `triangular2`
    halves its height with every cycle, `exp_range` shrinks it by `gamma` with every step; momentum
    moves in the opposite direction. Smith recommends half cycles of 2 to 10 epochs. The values are
    those of `torch.optim.lr_scheduler.CyclicLR`.

    Args:
        step: The step, counted from 0.
        total_steps: Steps of the run.
        cycles: Number of cycles in the run.
        base_factor: Factor at the beginning and the end of a cycle.
        rising: The part of a cycle in which the factor rises, less than 1.
        mode: How the height of the cycles changes over the run.
        gamma: Factor of the height per step with `exp_range`, at most 1.
        cycle_momentum: Whether the schedule sets the momentum.
        base_momentum: Momentum at the peak.
        max_momentum: Momentum at the base.
    """
    if rising >= 1:
        raise UsageError(
            f"cyclical(rising={rising:g}): this is a part of the cycle; give less than 1"
        )
    if gamma > 1:
        raise UsageError(f"cyclical(gamma={gamma:g}): gamma shrinks the cycles; give at most 1")
    cycle, progress = divmod(step * cycles / total_steps, 1.0)
    slope = progress / rising if progress <= rising else (progress - 1) / (rising - 1)
    height = slope * {"triangular": 1.0, "triangular2": 0.5**cycle, "exp_range": gamma**step}[mode]
    momentum = _line(max_momentum, base_momentum, height) if cycle_momentum else None
    return ScheduleValue(_line(base_factor, 1.0, height), momentum)


@schedule
def cosine(step: int, total_steps: int, *, final_factor: Fraction = 0.0) -> ScheduleValue:
    """Decay from the peak to `final_factor` of it along half a cosine.

    This is one cycle of Loshchilov and Hutter, "SGDR" (arXiv:1608.03983). CosineAnnealingLR
    computes the same with T_max = total_steps; the final factor is reached after the last step.
    """
    return ScheduleValue(_cosine(1.0, final_factor, step / total_steps))


@schedule
def linear(step: int, total_steps: int, *, final_factor: Fraction = 0.0) -> ScheduleValue:
    """Decay linearly from the peak to `final_factor` of it, reached after the last step."""
    return ScheduleValue(_line(1.0, final_factor, step / total_steps))


@schedule
def constant(step: int, total_steps: int) -> ScheduleValue:  # noqa: ARG001
    """Keep the peak learning rate at every step."""
    return ScheduleValue(1.0)


@schedule
def exponential(
    step: int, total_steps: int, *, initial_factor: PositiveFloat = 1e-7
) -> ScheduleValue:
    """Grow from `initial_factor` to the peak by the same ratio in every step.

    Learning-rate range tests use it (Smith, arXiv:1506.01186).
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
    """Multiply the factor by `gamma` at each milestone, a fraction of the run (MultiStepLR)."""
    if not all(0 <= milestone <= 1 for milestone in milestones):
        raise UsageError(
            f"multi_step(milestones={milestones}): give fractions of the run between 0 and 1"
        )
    num_passed = sum(step >= milestone * total_steps for milestone in milestones)
    return ScheduleValue(gamma**num_passed)


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
    """Warm up linearly, stay at the peak, and decay in the last part of the run.

    Hu et al., "MiniCPM" (arXiv:2404.06395). `decay="sqrt"` follows 1 - sqrt(progress), which Hägele
    et al. (arXiv:2405.18392) found best for language models. A model from the stable phase can be
    trained further and decayed later.
    """
    if warmup_fraction + decay_fraction > 1:
        raise UsageError(
            f"wsd(warmup_fraction={warmup_fraction:g}, decay_fraction={decay_fraction:g}): warm-up "
            "and decay are parts of the run; give fractions with a sum of at most 1"
        )
    warmup_steps = round(warmup_fraction * total_steps)
    decay_steps = round(decay_fraction * total_steps)
    if step < warmup_steps:
        return ScheduleValue((step + 1) / (warmup_steps + 1))
    decay_start = total_steps - decay_steps
    if step <= decay_start:
        return ScheduleValue(1.0)
    progress = (step - decay_start) / decay_steps
    if decay == "cos":
        return ScheduleValue(_cosine(1.0, final_factor, progress))
    along = math.sqrt(progress) if decay == "sqrt" else progress
    return ScheduleValue(_line(1.0, final_factor, along))


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
    """Rise linearly to the first value of the schedule `then`, which takes the rest of the run.

    Goyal et al., "Accurate, Large Minibatch SGD" (arXiv:1706.02677), warm up over 5 epochs from
    the unscaled learning rate, which is a `start_factor` of lr_batch_size / batch_size.

    Args:
        step: The step, counted from 0.
        total_steps: Steps of the run, including the warm-up.
        then: The schedule that follows.
        fraction: Part of the run that the warm-up takes.
        steps: Steps that the warm-up takes, instead of `fraction`.
        start_factor: Factor of step 0.
    """
    if not isinstance(then, Schedule):
        raise UsageError(f"warmup(then={then!r}): give a schedule, such as warmup(cosine())")
    limit = total_steps - 1
    warmup_steps = min(steps if steps is not None else round(fraction * total_steps), limit)
    value = then.at(max(step - warmup_steps, 0), max(total_steps - warmup_steps, 1))
    if step >= warmup_steps:
        return value
    return ScheduleValue(_line(start_factor, value.factor, step / warmup_steps), value.momentum)


def _line(start: float, end: float, progress: float) -> float:
    return (end - start) * progress + start


def _cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) / 2.0 * (1 + math.cos(math.pi * progress))
