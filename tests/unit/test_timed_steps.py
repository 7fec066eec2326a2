"""The setting `max_time`: its values, the steps that fit in a time, and the plan that they make."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from examples import LAPTOP, recipe

from launcher import Plan, PlanError, RecipeError, make_plan
from launcher.engine.data.sampler import EvaluationSchedule, Horizon, Sampler
from launcher.planning.timed_plan import timed_plan
from launcher.planning.timed_steps import (
    Interruptions,
    TimeCosts,
    TimedSteps,
    fitting_steps,
    reserved_for_evaluation,
    seconds_needed,
)
from launcher.recipe.max_time import seconds_in


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("30min", 1800), ("2h", 7200), ("0.5h", 1800)]
)
def test_a_time_has_a_unit(text: str, seconds: float) -> None:
    """A value is a number with s, min or h."""
    assert seconds_in(recipe(max_time=text).max_time or "") == seconds


@pytest.mark.parametrize("text", ["90", "0h", "0.0min", "-1h", "1d", "00:30:00", "h", "1 h", 90])
def test_malformed_times_are_refused(text: object) -> None:
    """A value without a unit, of another form, or of zero is refused by the name of the setting."""
    with pytest.raises(RecipeError, match=r"Recipe\(max_time=\.\.\.\): expected a time such as"):
        recipe(max_time=text)


def test_a_growing_batch_is_refused() -> None:
    """max_time and batch_milestones exclude each other."""
    with pytest.raises(PlanError, match=r"max_time=1h.*batch_milestones"):
        make_plan(recipe(max_time="1h", batch_milestones=(0.5,)), LAPTOP)


@pytest.mark.parametrize(
    ("costs", "interruptions", "steps"),
    [
        (TimeCosts(step=0.1), Interruptions(), 50 + 970),
        (TimeCosts(step=0.1, end=7.0), Interruptions(), 50 + 900),
        # 87 s of steps, evaluations after steps 100, 200, ..., 900, and one at the end.
        (TimeCosts(step=0.1, evaluation=1.0), Interruptions(evaluate_every=100), 50 + 870),
        # 95 s of steps and a checkpoint after step 500; that of the end is not counted again.
        (TimeCosts(step=0.1, checkpoint=2.0), Interruptions(save_every_steps=500), 50 + 950),
        (TimeCosts(step=0.1, checkpoint=2.0), Interruptions(save_every_seconds=30), 50 + 910),
        (TimeCosts(step=0.001), Interruptions(), 10_000),
        (TimeCosts(step=200.0), Interruptions(), 50),
        (TimeCosts(step=0.1, end=98.0), Interruptions(), 50),
    ],
)
def test_steps_that_fit_in_100_seconds(
    costs: TimeCosts, interruptions: Interruptions, steps: int
) -> None:
    """97 of 100 s are filled with steps, evaluations, checkpoints and the end, after 50 steps."""
    assert fitting_steps(100.0, 50, 10_000, costs, interruptions) == steps


def test_no_more_steps_fit() -> None:
    """The number of steps is the largest one whose time is at most what is usable."""
    costs = TimeCosts(step=0.07, evaluation=0.9, checkpoint=0.4, end=1.3)
    for every, seconds in itertools.product((3, 7, 50), (5.0, 20.0, 33.3)):
        interruptions = Interruptions(evaluate_every=every, save_every_steps=11)
        times = [seconds_needed(5, last, costs, interruptions) for last in range(6, 1000)]
        assert times == sorted(times)
        expected = 5 + sum(time <= 0.97 * seconds for time in times)
        assert fitting_steps(seconds, 5, 999, costs, interruptions) == expected


@pytest.mark.parametrize(("wait", "seconds"), [(0.0, 10.0), (0.1, 15.0), (0.2, 20.0), (9.0, 20.0)])
def test_what_is_reserved_for_an_evaluation(wait: float, seconds: float) -> None:
    """An unknown evaluation takes half of the time of training, or all of it where data is slow."""
    assert reserved_for_evaluation(6400, 64, 0.2, wait) == pytest.approx(seconds)


def timed() -> tuple[Plan, Plan]:
    """Return a plan with max_time, and the one with 20 of its 60 steps, known after 5."""
    settings = recipe(max_time="30min", evaluate_every=8)
    plan = make_plan(settings, LAPTOP, nproc_per_node=2)
    steps = TimedSteps(max_time="30min", limit=60, first_step=5, steps=20)
    return plan, timed_plan(plan, settings, steps)


def test_the_schedule_spans_the_steps_that_fit() -> None:
    """The first steps follow the schedule over the limit, the others over the steps that fit."""
    schedule = recipe().schedule
    plan, planned = timed()
    assert (plan.total_steps, planned.total_steps) == (60, 20)
    values = [planned.schedule_value_at(schedule, step) for step in range(20)]
    assert values == [schedule.at(step, 60 if step < 5 else 20) for step in range(20)]
    assert planned.lr_peak_step == 1 + max(range(20), key=lambda step: values[step].factor)
    assert planned.lr_end == pytest.approx(planned.lr * values[-1].factor)


def test_the_plan_in_run_yaml_holds_the_steps() -> None:
    """A plan is read back as it was written; other ranks and checkpoints see the same steps."""
    plan, planned = timed()
    assert Plan.from_dict(planned.to_dict()) == planned
    assert planned.agreement()["timed_steps"] == {
        "max_time": "30min",
        "limit": 60,
        "first_step": 5,
        "steps": 20,
    }
    assert sorted(plan.differences(planned.agreement())) == [
        "lr_peak_step",
        "timed_steps",
        "total_steps",
    ]


@pytest.mark.parametrize("ahead", [0, 1, 7, 40])
def test_samples_are_those_of_a_run_with_as_many_steps(ahead: int) -> None:
    """A stream that ends earlier than planned yields what the stream of the shorter run yields."""
    plan, planned = timed()
    sampler = Sampler(
        plan=plan,
        rank=1,
        train_samples=1437,
        evaluations=(EvaluationSchedule(name="", samples=300, every=8),),
    )
    horizon = Horizon(plan.total_steps)
    stream = sampler.requests(0, horizon)
    taken = list(itertools.islice(stream, ahead))
    horizon.last_step = max(20, horizon.requested)
    taken += stream
    shorter = replace(planned, total_steps=horizon.last_step)
    assert taken == list(replace(sampler, plan=shorter).requests())
