"""Schedules, compared with PyTorch's schedulers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CyclicLR,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    OneCycleLR,
    SequentialLR,
)

from launcher import cosine, cyclical, linear, multi_step, one_cycle, schedule, warmup, wsd
from launcher.errors import UsageError
from launcher.recipe.callspec import parse
from launcher.recipe.schedules import SCHEDULES, Schedule, ScheduleValue


def oracle(make: Any, total_steps: int) -> list[tuple[float, float]]:
    """Return the (learning rate, momentum) that PyTorch's scheduler sets in each step."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=1.0, momentum=0.9)
    scheduler: LRScheduler = make(optimizer)
    path = []
    for step in range(total_steps):
        group = optimizer.param_groups[0]
        path.append((group["lr"], group["momentum"]))
        optimizer.step()
        if step < total_steps - 1:
            scheduler.step()
    return path


@pytest.mark.parametrize("total_steps", [7, 20, 100, 1001])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"three_phase": False, "pct_start": 0.3, "anneal_strategy": "cos"},
        {"div_factor": 25.0, "final_div_factor": 1e4, "base_momentum": 0.8, "max_momentum": 0.9},
    ],
)
def test_one_cycle_is_onecyclelr(total_steps: int, arguments: dict[str, Any]) -> None:
    """Learning rate and momentum of every step are those of OneCycleLR."""
    defaults: dict[str, Any] = {
        "pct_start": 0.45,
        "div_factor": 10,
        "final_div_factor": 1000,
        "three_phase": True,
        "anneal_strategy": "linear",
    }
    expected = oracle(
        lambda optimizer: OneCycleLR(
            optimizer, 1.0, total_steps=total_steps, **defaults | arguments
        ),
        total_steps,
    )
    values = [one_cycle(**arguments).at(step, total_steps) for step in range(total_steps)]
    assert values == [pytest.approx(pair, abs=1e-15) for pair in expected]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({}, {"step_size_up": 10}),
        ({"mode": "triangular2"}, {"step_size_up": 10, "mode": "triangular2"}),
        (
            {"mode": "exp_range", "gamma": 0.99, "rising": 0.25},
            {"step_size_up": 5, "step_size_down": 15, "mode": "exp_range", "gamma": 0.99},
        ),
    ],
    ids=["triangular", "triangular2", "exp_range"],
)
def test_cyclical_is_cycliclr(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    """Learning rate and momentum of every step are those of CyclicLR with cycles of 20 steps."""
    expected = oracle(lambda o: CyclicLR(o, base_lr=0.1, max_lr=1.0, **theirs), 100)
    rule = cyclical(cycles=5, **ours)
    assert [rule.at(step, 100) for step in range(100)] == [pytest.approx(pair) for pair in expected]


@pytest.mark.parametrize(
    ("decay", "at_half"), [("linear", 0.55), ("cos", 0.55), ("sqrt", 1 - 0.9 * 0.5**0.5)]
)
def test_wsd_has_three_parts(decay: Any, at_half: float) -> None:
    """The factor rises over a tenth of the run, stays, and falls to the final one over a fifth."""
    rule = wsd(warmup_fraction=0.1, decay_fraction=0.2, decay=decay, final_factor=0.1)
    factors = [rule.at(step, 1000).factor for step in range(1001)]
    assert factors[0] == pytest.approx(1 / 101)
    assert factors[:101] == sorted(factors[:101])
    assert set(factors[100:801]) == {1.0}
    assert factors[900] == pytest.approx(at_half)
    assert factors[800:] == sorted(factors[800:], reverse=True)
    assert factors[1000] == pytest.approx(0.1)


def test_one_cycle_is_that_of_the_paper() -> None:
    """The factor goes from 1/10 to 1 and back in equal times, then to 1/10,000."""
    factors = [one_cycle().at(step, 100).factor for step in range(100)]
    assert factors[0] == pytest.approx(0.1)
    assert factors[44] == 1.0
    assert factors[88] == pytest.approx(0.1)
    assert factors[99] == pytest.approx(1e-4)
    momenta = [one_cycle().at(step, 100).momentum for step in (0, 44, 88, 99)]
    assert momenta == pytest.approx([0.95, 0.85, 0.95, 0.95])


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (cosine(final_factor=0.1), lambda o: CosineAnnealingLR(o, T_max=50, eta_min=0.1)),
        (linear(), lambda o: LinearLR(o, 1.0, 0.0, total_iters=50)),
        (multi_step(milestones=(0.5, 0.8), gamma=0.2), lambda o: MultiStepLR(o, [25, 40], 0.2)),
        (
            warmup(cosine(), steps=10, start_factor=0.1),
            lambda o: SequentialLR(
                o,
                [LinearLR(o, 0.1, 1.0, total_iters=10), CosineAnnealingLR(o, T_max=40)],
                milestones=[10],
            ),
        ),
    ],
    ids=["cosine", "linear", "multi_step", "warmup"],
)
def test_decays_are_those_of_pytorch(ours: Schedule, theirs: Any) -> None:
    """Each rule returns the learning rates of PyTorch's scheduler of the same kind."""
    expected = [lr for lr, _ in oracle(theirs, 50)]
    assert [ours.at(step, 50).factor for step in range(50)] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("total_steps", [1, 2, 3])
@pytest.mark.parametrize("name", sorted(SCHEDULES.keys() - {"warmup", "torch_schedule", "plateau"}))
def test_runs_of_few_steps_have_a_learning_rate(name: str, total_steps: int) -> None:
    """No rule divides by zero or leaves (0, 1] in a run of one, two or three steps."""
    rule = parse(name, SCHEDULES, kind="schedule")
    assert isinstance(rule, Schedule)
    for tested in (rule, warmup(rule)):
        for step in range(total_steps):
            assert 0 < tested.at(step, total_steps).factor <= 1


def test_a_schedule_reads_back_as_it_prints() -> None:
    """The text of a schedule, including nested ones, parses to an equal schedule."""
    for rule in (one_cycle(), warmup(one_cycle(div_factor=25), steps=3), multi_step(gamma=0.5)):
        assert parse(str(rule), SCHEDULES, kind="schedule") == rule


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one_cycl", "Did you mean one_cycle?"),
        ("one_cycle(", "NAME(argument=value)"),
        ("one_cycle(div_factor='a')", "expected a number greater than 0, found the text 'a'"),
        ("one_cycle(pct_start=0.6)", "0.5"),
        ("cosine(final=1)", "takes no 'final'; it takes final_factor"),
        ("warmup(3)", "expected"),
        ("warmup()", "needs then"),
        ("__import__('os')", "there is no schedule '__import__'"),
        ("cosine.__class__", "NAME(argument=value)"),
        ("cyclical(rising=1.0)", "rising=1"),
        ("cyclical(gamma=1.1)", "gamma=1.1"),
        ("wsd(warmup_fraction=0.6, decay_fraction=0.5)", "warmup_fraction=0.6, decay_fraction=0.5"),
        ("multi_step(milestones=[3])", "between 0 and 1"),
    ],
)
def test_a_bad_schedule_is_refused(text: str, message: str) -> None:
    """A schedule that does not fit is refused with what was expected; no text is executed."""
    with pytest.raises(UsageError) as caught:
        parse(text, SCHEDULES, kind="schedule")
    assert message in str(caught.value)


def test_a_recipe_can_define_a_rule() -> None:
    """A rule decorated with @schedule takes arguments, prints, and is found by its name."""

    @schedule
    def two_levels(step: int, total_steps: int, *, at: float = 0.5) -> ScheduleValue:
        return ScheduleValue(1.0 if step < at * total_steps else 0.1)

    try:
        rule = parse("two_levels(at=0.25)", SCHEDULES, kind="schedule")
        assert rule == two_levels(at=0.25)
        assert str(rule) == "two_levels(at=0.25)"
        assert [two_levels(at=0.25).at(step, 4).factor for step in range(4)] == [1.0, 0.1, 0.1, 0.1]
    finally:
        del SCHEDULES["two_levels"]
