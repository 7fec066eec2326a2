"""Runs with a growing batch: the samples of each step, and the learning rate."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest

from launcher import PlanError, Recipe, constant, make_plan, read_machine
from launcher.console.explain import explain
from launcher.console.plots import schedule_plots
from launcher.planning.plan import Plan
from launcher.planning.stages import Course, Stage, Window, make_stages, stage_at


def walk(stages: tuple[Stage, ...], samples: int, steps: int) -> list[Window]:
    """Return the window of each step, found by walking through the data step by step."""
    windows, epoch, start = [], 0, 0
    for step in range(steps):
        size = min(stage_at(stages, step).batch_size, samples - start)
        windows.append(Window(epoch, start, size))
        start += size
        if start == samples:
            epoch, start = epoch + 1, 0
    return windows


@pytest.mark.parametrize("samples", [7, 50, 64])
@pytest.mark.parametrize("sizes", [(7,), (3, 6), (2, 5, 7), (6, 2)])
@pytest.mark.parametrize("all_milestones", [(0.1, 0.2), (0.3, 0.7), (0.5, 0.51)])
@pytest.mark.parametrize("epochs", [1, 3])
def test_windows_are_those_of_a_walk_through_the_data(
    samples: int, sizes: tuple[int, ...], all_milestones: tuple[float, ...], epochs: int
) -> None:
    """The windows of the steps follow each other, cover each epoch, and end with the run."""
    milestones = all_milestones[: len(sizes) - 1]
    stages, steps = make_stages(sizes, milestones, samples=samples, epochs=epochs, steps=None)
    course = Course(stages, samples)
    windows = [course.window(step) for step in range(steps)]
    assert windows == walk(stages, samples, steps)
    assert sum(window.size for window in windows) == epochs * samples
    positions = itertools.accumulate((window.size for window in windows), initial=0)
    assert [course.position(step) for step in range(steps + 1)] == list(positions)
    for stage, milestone in zip(stages[1:], milestones, strict=False):
        if len(stages) == len(sizes):
            boundary = round(milestone * epochs * samples)
            assert course.position(stage.first_step - 1) < boundary
            assert course.position(stage.first_step) >= boundary


def test_milestones_of_a_run_in_steps_are_steps() -> None:
    """The milestones of a run that is stated in steps are fractions of its steps."""
    stages, steps = make_stages((8, 16), (0.25,), samples=None, epochs=None, steps=100)
    assert steps == 100
    assert [(stage.first_step, stage.batch_size) for stage in stages] == [(0, 8), (25, 16)]


def test_a_stage_without_steps_is_dropped() -> None:
    """The last of several milestones that fall on the same step counts."""
    stages, _ = make_stages((8, 16, 32), (0.1, 0.2), samples=None, epochs=None, steps=4)
    assert [(stage.first_step, stage.batch_size) for stage in stages] == [(0, 16), (1, 32)]


def nothing(*_: Any) -> Any:
    raise AssertionError


RECIPE = Recipe(
    name="growing",
    model=nothing,
    data=nothing,
    loss=nothing,
    batch_size=64,
    batch_milestones=(0.5, 0.75),
    lr=0.1,
    lr_batch_size=64,
    epochs=4,
    train_samples=640,
    schedule=constant(),
    device="cpu",
)


def plan_of(**changes: Any) -> Plan:
    """Return the plan of the recipe on two ranks."""
    return make_plan(replace(RECIPE, **changes), read_machine(), nproc_per_node=2)


@pytest.mark.parametrize(
    ("rule", "lrs"),
    [("linear", [0.1, 0.2, 0.4]), ("sqrt", [0.1, 0.1 * 2**0.5, 0.2]), ("none", [0.1, 0.1, 0.1])],
)
def test_the_learning_rate_grows_with_the_batch(rule: str, lrs: list[float]) -> None:
    """The learning rate grows by the recipe's rule from the first step of each stage on."""
    plan = plan_of(lr_rule=rule)
    assert [(stage.first_step, stage.batch_size) for stage in plan.stages] == [
        (0, 64),
        (20, 128),
        (25, 256),
    ]
    assert plan.total_steps == 28
    steps = [0, 19, 20, 24, 25, 27]
    planned = [plan.lr * plan.schedule_value_at(constant(), step).factor for step in steps]
    assert planned == pytest.approx([lr for lr in lrs for _ in range(2)])
    assert plan.lr_end == pytest.approx(lrs[-1])
    assert plan.lr_peak_step == (1 if rule == "none" else 26)


def test_a_plan_shows_the_stages() -> None:
    """The stages are in the plan's text, and are plotted beside the learning rate."""
    plan = plan_of()
    assert "then 128 from step 21 (peak lr 0.2), 256 from step 26 (peak lr 0.4)" in explain(plan)
    lr, batch = schedule_plots(constant(), plan)
    assert max(batch.curves[0].ys) == 256
    assert lr.curves[0].ys[0] == pytest.approx(0.1)
    assert len(schedule_plots(constant(), plan_of(batch_milestones=()))) == 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_milestones": (0.6, 0.3)}, "batch_milestones=0.6,0.3"),
        ({"batch_milestones": (0.0,)}, "batch_milestones=0"),
        ({"batch_gamma": 0.1}, "batch_size=1 "),
        ({"batch_gamma": 8}, "batch_gamma"),
    ],
)
def test_impossible_stages_are_refused(changes: dict[str, Any], message: str) -> None:
    """Stages that are out of order, too small or too large are refused by the setting's name."""
    with pytest.raises(PlanError) as caught:
        plan_of(**changes)
    assert message in str(caught.value)
