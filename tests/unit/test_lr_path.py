"""The path of the learning rate: long runs are planned as short ones, without visiting steps."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from typing import Any

import pytest

from launcher import (
    PlanError,
    Recipe,
    constant,
    cosine,
    cyclical,
    exponential,
    linear,
    make_plan,
    multi_step,
    one_cycle,
    read_machine,
    warmup,
    wsd,
)
from launcher.console.explain import schedule_change
from launcher.planning import lr_path as module
from launcher.planning.lr_path import first_difference, lr_path
from launcher.planning.stages import Stage, growth_at
from launcher.recipe.recipe import EXCLUSIVE
from launcher.recipe.schedules import SCHEDULES as KNOWN
from launcher.recipe.schedules import Schedule, ScheduleValue, schedule

SCHEDULES = [
    one_cycle(),
    one_cycle(three_phase=False, anneal_strategy="cos", pct_start=0.3),
    cosine(),
    linear(final_factor=0.2),
    constant(),
    exponential(),
    multi_step(),
    multi_step(gamma=2.0),
    wsd(),
    wsd(decay="sqrt"),
    warmup(cosine()),
    warmup(one_cycle(), steps=5),
    cyclical(),
    cyclical(cycles=3.5, mode="triangular2"),
    cyclical(cycles=2, mode="exp_range", gamma=0.999),
]

STAGES = [
    (Stage(first_step=0, batch_size=8),),
    (Stage(first_step=0, batch_size=8), Stage(first_step=3, batch_size=16)),
]


def visited(schedule: Schedule, total: int, stages: Any, rule: str) -> tuple[float, float, int]:
    """Return what the planner found before it sampled: with a visit to a window of the steps."""

    def factor(step: int) -> float:
        return schedule.at(step, total).factor * growth_at(stages, step, rule)

    stride = max(total // 1_000, 1)
    sampled = {*range(0, total, stride), *(stage.first_step for stage in stages)}
    highest = max(sorted(sampled), key=factor)
    window = range(max(highest - stride + 1, 0), min(highest + stride, total))
    return factor(0), factor(total - 1), max(window, key=factor) + 1


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("total", [4, 7, 100, 999, 1_000, 1_001, 12_345, 1_000_000])
@pytest.mark.parametrize("stages", STAGES)
def test_ordinary_runs_are_planned_to_the_bit_as_before(
    schedule: Schedule, total: int, stages: Any
) -> None:
    """Up to ten million steps, the ends and the peak are those of a visit to the steps."""
    path = lr_path(schedule, total, stages, "linear")
    assert (path.start, path.end, path.peak_step) == visited(schedule, total, stages, "linear")


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("total", [777_777, 2_000_000])
def test_sampling_finds_the_peak_that_a_visit_finds(
    schedule: Schedule, total: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that is sampled several times over has the highest factor of a run that is visited."""
    monkeypatch.setattr(module, "_MAX_VISITED", 3_000)
    path = lr_path(schedule, total, STAGES[0], "linear")
    peak = visited(schedule, total, STAGES[0], "linear")[2]
    assert path.highest == pytest.approx(schedule.at(peak - 1, total).factor, rel=1e-5)
    if not str(schedule).startswith("cyclical"):
        assert path.peak_step == pytest.approx(peak, abs=5)


def nothing(*_: Any) -> Any:
    raise AssertionError


RECIPE = Recipe(
    name="long",
    model=nothing,
    data=nothing,
    loss=nothing,
    batch_size=64,
    lr=0.1,
    lr_batch_size=64,
    epochs=4,
    train_samples=640,
    device="cpu",
)


def varied(**changes: Any) -> Recipe:
    """Return the recipe with other settings; of an exclusive pair, the other is cleared."""
    for names in EXCLUSIVE:
        given = [name for name in names if changes.get(name) is not None]
        for name in names if given else ():
            changes.setdefault(name, None)
    return replace(RECIPE, **changes)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 10**12},
        {"train_samples": 10**18},
        {"steps": 10**15},
        {"steps": 2**63 - 1},
        {"steps": 10**15, "batch_milestones": (0.3, 0.6)},
        {"epochs": 10**12, "batch_milestones": (0.3, 0.6)},
        {"steps": 10**15, "schedule": cyclical(cycles=1e9)},
        {"steps": 10**15, "schedule": warmup(wsd(), steps=10**12)},
        {"steps": 10**15, "schedule": multi_step(milestones=(0.1, 0.2, 0.3))},
        {"train_samples": 2**62, "batch_size": 2**62, "lr_batch_size": 2**62},
    ],
    ids=str,
)
def test_a_run_of_any_length_is_planned_within_a_second(changes: dict[str, Any]) -> None:
    """The time to plan does not depend on the number of steps, samples or epochs."""
    recipe = varied(**changes)
    machine = read_machine()
    began = time.process_time()
    plan = make_plan(recipe, machine, nproc_per_node=2)
    assert time.process_time() - began < 1
    assert plan.lr_peak_step is not None
    assert plan.lr_start is not None
    assert plan.lr_end is not None
    assert 1 <= plan.lr_peak_step <= plan.total_steps
    assert math.isfinite(plan.lr_start)
    assert math.isfinite(plan.lr_end)


def test_the_peak_of_a_long_run_is_where_that_of_a_short_one_is() -> None:
    """The peak of one_cycle() is at 45 % of the run, however long it is."""
    for steps in (10**3, 10**6, 10**9, 10**12, 10**15):
        plan = make_plan(varied(steps=steps), read_machine(), nproc_per_node=2)
        assert plan.lr_peak_step is not None
        assert plan.lr_peak_step / steps == pytest.approx(0.45, abs=2 / 1000)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 2**63 - 1},
        {"batch_milestones": (0.3, 0.6), "batch_gamma": 1e300, "train_samples": 2**62},
        {"lr": 1e308, "lr_batch_size": 1},
        {"lr": 5e-324, "lr_batch_size": 2**62},
        {"schedule": multi_step(gamma=1e300)},
        {"schedule": cyclical(cycles=1e308)},
        {"lr": 1e300, "schedule": multi_step(gamma=1e10)},
    ],
    ids=str,
)
def test_numbers_beyond_the_range_are_refused(changes: dict[str, Any]) -> None:
    """What a float or 64 bits cannot hold is one error, and no infinite learning rate."""
    with pytest.raises(PlanError):
        make_plan(varied(**changes), read_machine(), nproc_per_node=2)


def test_more_ranks_than_a_plan_can_list_are_refused() -> None:
    """A plan lists the samples of each rank, so that their number is limited."""
    with pytest.raises(PlanError, match="at most 1,000,000 ranks"):
        make_plan(RECIPE, read_machine(), nodes=10**12, nproc_per_node=2)


def test_a_schedule_that_raises_is_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """An exception within a schedule of the user names the schedule and the step."""
    monkeypatch.setitem(KNOWN, "fragile", cosine)  # removed again after the test

    @schedule
    def fragile(step: int, total_steps: int) -> ScheduleValue:
        return ScheduleValue(1 / (total_steps - 40 - step))

    with pytest.raises(PlanError, match=r"fragile\(\): step 1 of 40 .*ZeroDivisionError"):
        make_plan(varied(schedule=fragile(), steps=40), read_machine(), nproc_per_node=2)


@pytest.mark.parametrize("total", [100, 20_000, 50_000, 10**6, 10**12, 10**15])
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.99999])
def test_the_first_difference_is_found(total: int, share: float) -> None:
    """The first step that differs is found to the step, in a run of any length."""
    first = int(share * total)
    calls = 0

    def differs(step: int) -> bool:
        nonlocal calls
        calls += 1
        return step >= first

    assert first_difference(range(total), differs) == first
    assert first_difference(range(total), lambda _: False) is None
    assert calls < 30_000


def test_a_changed_schedule_of_a_long_run_is_explained_within_a_second() -> None:
    """A resumed run of 10**15 steps says where its learning rate begins to differ."""
    machine = read_machine()
    old, new = (
        varied(steps=10**15, schedule=multi_step(milestones=(milestone,)))
        for milestone in (0.5, 0.75)
    )
    plans = [make_plan(recipe, machine, nproc_per_node=2) for recipe in (old, new)]
    began = time.process_time()
    change = schedule_change(10, (plans[0], old.schedule), (plans[1], new.schedule))
    assert time.process_time() - began < 1
    assert change is not None
    assert f"step {10**15 // 2 + 1:,}" in change
