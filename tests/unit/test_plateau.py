"""`plateau`, compared with ReduceLROnPlateau in a plain loop."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import ReduceLROnPlateau

from launcher import all_predictions, make_plan, plateau, read_machine, warmup
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.engine.training.live_schedules import Plateau, live_schedule
from launcher.errors import OverrideError, RecipeError, UsageError
from launcher.json_file import exact_floats, restored_floats
from launcher.recipe.callspec import parse
from launcher.recipe.keep_best import check_set_metric
from launcher.recipe.metric_goal import check_goal, read_goal
from launcher.recipe.overrides import COMMAND_LINE, Override, build
from launcher.recipe.resolve import reference_of
from launcher.recipe.schedules import SCHEDULES, Schedule, cosine
from launcher.recipes.digits import digits

LR = 0.3


def values_of(seed: int) -> list[float]:
    """Return the metric of 60 evaluations, which falls, stalls, rises, and is NaN once."""
    draws = random.Random(seed)
    values = [1 / (1 + step // 3) + 0.05 * draws.random() for step in range(60)]
    values[20] = float("nan")
    return values


def live(schedule: Schedule, *, evaluates: bool = True) -> tuple[Schedule, tuple[Plateau, ...]]:
    """Return the schedule as a run computes it, and its plateaus."""
    recipe = replace(digits(), lr=LR, lr_rule="none", schedule=schedule, train_samples=1437)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    sampler = Sampler(
        plan=plan, rank=0, train_samples=1437, evaluations=(EvaluationSchedule(samples=360),)
    )
    return live_schedule(recipe, plan, sampler, has_evaluations=evaluates)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("mode", ["min", "max"])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"patience": 2, "factor": 0.5},
        {"patience": 0, "cooldown": 2, "threshold": 0.02, "threshold_mode": "abs"},
        {"patience": 1, "min_lr": 0.01, "eps": 1e-3},
    ],
)
def test_it_is_reduce_lr_on_plateau(arguments: dict[str, Any], mode: Any, seed: int) -> None:
    """Each step has the learning rate of torch's class, also after its state was stored."""
    optimizer = SGD([torch.zeros(1)], lr=LR)
    scheduler = ReduceLROnPlateau(optimizer, mode=mode, **arguments)
    schedule = plateau(metric=f"loss:{mode}", **arguments)
    computed, (own,) = live(schedule)
    for number, value in enumerate(values_of(seed), start=1):
        expected = optimizer.param_groups[0]["lr"]
        assert LR * computed.at(number, 100).factor == pytest.approx(expected, rel=1e-15)
        scheduler.step(value)
        own.observe(number, {"loss": value, "accuracy": 0.0})
        if number % 7 == 0:  # the run is resumed by another process
            state = json.loads(json.dumps(exact_floats(own.state())))
            computed, (own,) = live(schedule)
            own.restore(restored_floats(state))
            own.observe(number, {"loss": value})  # which the state holds already
    assert optimizer.param_groups[0]["lr"] < LR or not arguments


def test_it_follows_a_warm_up() -> None:
    """A warm-up rises to the learning rate that the evaluations have left."""
    computed, (own,) = live(warmup(plateau(patience=0), steps=4, start_factor=0.0))
    assert computed.at(2, 100).factor == pytest.approx(0.5)
    for step in (1, 2):
        own.observe(step, {"loss": 1.0})
    assert computed.at(2, 100).factor == pytest.approx(0.05)
    assert computed.at(50, 100).factor == pytest.approx(0.1)


def test_another_peak_keeps_the_reductions() -> None:
    """A run that is resumed with another lr has it reduced as often; another metric starts anew."""
    _, (own,) = live(plateau(patience=0))
    for step in (1, 2):
        own.observe(step, {"loss": 1.0})
    state = own.state()
    other = Plateau(plateau(patience=0), 2 * LR)
    other.restore(state)
    assert other(0, 1).factor == pytest.approx(0.1)
    other = Plateau(plateau(metric="accuracy:max", patience=0), LR)
    other.restore(state)
    other.observe(3, {"accuracy": -5.0})
    assert other(0, 1).factor == pytest.approx(0.1)


def test_a_set_that_was_not_evaluated_changes_nothing() -> None:
    """With several evaluation sets, a plateau waits for its own; an unknown name is refused."""
    _, (own,) = live(plateau(metric="dev/loss:min"))
    own.observe(1, {"test/loss": 1.0})
    assert own.state()["step"] == 0
    with pytest.raises(RecipeError, match="dev/loss"):
        own.observe(2, {"loss": 1.0})


def test_a_metric_of_no_set_is_refused_before_the_first_step() -> None:
    """The sets are known once the data is read; a metric with several values may have any key."""
    sets = ("dev", "test")
    metrics = {"several": all_predictions(lambda: None)}
    check_set_metric("dev/several/f1:max", sets, metrics, where="plateau(metric)")
    for goal in ("val/loss:min", "dev/other:min", "loss:min"):
        with pytest.raises(RecipeError, match="dev/loss"):
            check_set_metric(goal, sets, metrics, where="plateau(metric)")
    check_goal(read_goal("dev/several/f1:max", where=""), metrics, where="--metric")


def test_a_recipe_needs_what_it_follows() -> None:
    """A metric that no evaluation gives, and a recipe without evaluation data, are refused."""
    with pytest.raises(RecipeError, match=r"Did you mean accuracy\?"):
        replace(digits(), schedule=plateau(metric="acuracy:max"))
    with pytest.raises(RecipeError, match="acuracy"):
        replace(digits(), schedule=warmup(plateau(metric="acuracy:max")))
    with pytest.raises(RecipeError, match="evaluation data"):
        live(plateau(), evaluates=False)
    live(cosine(), evaluates=False)


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("plateau(metric='loss')", "loss:min"),
        ("plateau(factor=1.5)", "factor"),
        ("plateau(patience=-1)", "patience"),
        ("plateau(threshold_mode='both')", "threshold_mode"),
        ("plateau(patiense=3)", "patience"),
        ("plateau(metric='eror:min')", "eror"),
    ],
)
def test_wrong_arguments_are_refused(text: str, word: str) -> None:
    """An error names the argument before anything starts."""
    with pytest.raises(OverrideError) as caught:
        build(reference_of(digits), (Override(name="schedule", value=text, source=COMMAND_LINE),))
    assert word in str(caught.value)


def test_it_is_written_as_text() -> None:
    """The text names what differs from the defaults, and reads back."""
    schedule = plateau(metric="accuracy:max", patience=3)
    assert str(schedule) == "plateau(metric='accuracy:max', patience=3)"
    assert parse(str(schedule), SCHEDULES, kind="schedule") == schedule
    with pytest.raises(UsageError):
        schedule.at(0, 10)
