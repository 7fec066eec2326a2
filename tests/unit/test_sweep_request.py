"""Sweeps before they start: grids, choices of successive halving, shares of a machine, refusals."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytest
from support import ROOT

from launcher.analysis.halving import choose, num_choices, rung_steps
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.environment.machine import Machine, read_machine
from launcher.errors import PlanError, UsageError
from launcher.planning.evaluation_steps import next_evaluation
from launcher.planning.planner import make_plan
from launcher.recipe.grid import combinations_of, read_axes
from launcher.recipe.metric_goal import MetricGoal, read_goal
from launcher.recipe.overrides import COMMAND_LINE
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.sweeps.shares import divide
from launcher.sweeps.sweep_request import (
    PreparedSweep,
    StopRule,
    SweepRequest,
    prepare_sweep,
    read_grid,
)

GRIDDED = f"{ROOT / 'tests/recipes/gridded.py'}:gridded"
ERROR = MetricGoal(name="error", mode="min")


def prepared(*axes: str, machine: Machine | None = None, **values: Any) -> PreparedSweep:
    """Return the planned sweep of a command line."""
    request = SweepRequest(
        reference=resolve(GRIDDED),
        axes=read_axes(axes),
        source=COMMAND_LINE,
        **{"goal": ERROR, **values},
    )
    return prepare_sweep(request, machine or read_machine())


def test_the_runs_are_all_combinations() -> None:
    """The last setting changes fastest, and commas within brackets belong to a value."""
    axes = read_axes(["lr=0.1,0.2", "batch_milestones=[0.5,0.75],[]"])
    assert [dict(pairs) for pairs in combinations_of(axes)] == [
        {"lr": "0.1", "batch_milestones": "[0.5,0.75]"},
        {"lr": "0.1", "batch_milestones": "[]"},
        {"lr": "0.2", "batch_milestones": "[0.5,0.75]"},
        {"lr": "0.2", "batch_milestones": "[]"},
    ]
    trials = prepared("lr=0.1,0.2", "width=2,3").trials
    assert [dict(trial.settings) for trial in trials] == [
        {"lr": 0.1, "width": 2},
        {"lr": 0.1, "width": 3},
        {"lr": 0.2, "width": 2},
        {"lr": 0.2, "width": 3},
    ]
    assert [trial.plan.lr for trial in trials] == [0.1, 0.1, 0.2, 0.2]


@pytest.mark.parametrize(
    ("axes", "values", "word"),
    [
        (["bogus=1,2"], {}, "bogus"),
        (["lr="], {}, "lr="),
        (["lr=0.1,,0.2"], {}, "empty"),
        (["lr=0.1,1e-1"], {}, "lr lists 0.1 twice"),
        (["lr=0.1", "lr=0.2"], {}, "twice"),
        (["lr=0.1,many"], {}, "many"),
        ([], {}, "lr="),
        (["lr=" + ",".join(map(str, range(1, 1002)))], {}, "1,001"),
        (["lr=1,2"], {"goal": MetricGoal(name="eror", mode="min")}, "Did you mean error?"),
        (["lr=1,2", "micro_batch_size=4,64"], {"parallel": 10**6}, "--parallel 1000000"),
        (["lr=1,2", "device=cuda"], {}, "GPU"),
        (["device=cpu,cuda"], {}, "device"),
        (["lr=1,2"], {"rule": StopRule(eta=3, min_steps=18)}, "--min-steps 18"),
        (["lr=1,2,3,4,5,6,7,8,9", "evaluate_every=6"], {"rule": StopRule(eta=3, min_steps=None)},
         "evaluate_every"),
        (["virtual_ranks=2,40"], {}, "virtual_ranks=40"),
    ],
)  # fmt: skip
def test_a_wrong_sweep_is_refused(axes: list[str], values: dict[str, Any], word: str) -> None:
    """Nothing is written for a sweep that cannot be trained, and the error names what is wrong."""
    with pytest.raises(UsageError) as caught:
        prepared(*axes, **values)
    assert word in str(caught.value)


@pytest.mark.parametrize("grid", [["lr"], {"lr": 0.1}, {"lr": "0.1,0.2"}])
def test_a_grid_is_a_dictionary_of_lists(grid: object) -> None:
    """A program that gives something else is told the form."""
    with pytest.raises(UsageError, match=r"\[.*\]"):
        read_grid(grid)


@pytest.mark.parametrize("text", ["error", "error:", ":max", "error:mean", ""])
def test_a_metric_has_a_direction(text: str) -> None:
    """A metric without min or max is refused."""
    with pytest.raises(UsageError, match="NAME:max"):
        read_goal(text, where="--metric")


def test_a_metric_of_an_evaluation_set_is_known() -> None:
    """The name of an evaluation set before a slash is left to the data."""
    assert prepared("lr=1,2", goal=MetricGoal(name="dev/error", mode="min")).goal.name


@pytest.mark.parametrize(
    ("runs", "eta", "choices"),
    [(1, 3, 0), (2, 3, 1), (9, 3, 2), (10, 3, 2), (27, 3, 3), (16, 2, 4)],
)
def test_the_choices_leave_one_run(runs: int, eta: int, choices: int) -> None:
    """One of every `eta` runs is kept at each choice, until one is left."""
    assert num_choices(runs, eta) == choices
    rungs = rung_steps([900] * runs, eta, None)
    assert [rung[0] for rung in rungs] == [
        -(-900 // eta ** (choices - choice)) for choice in range(choices)
    ]


def test_the_first_choice_can_be_given() -> None:
    """Each choice comes after `eta` times as many steps as the one before, within all runs."""
    assert rung_steps([100, 80] * 8, 2, 12) == tuple((steps,) * 16 for steps in (12, 24, 48))


def test_the_best_runs_go_on() -> None:
    """NaN and failed runs are the worst, and of equal runs the first is kept."""
    values = {0: 0.5, 1: None, 2: float("nan"), 3: 0.5, 4: 0.9, 7: 0.5}
    assert choose(values, MetricGoal(name="accuracy", mode="max"), 3) == (0, 4)
    assert choose(values, MetricGoal(name="loss", mode="min"), 2) == (0, 3, 7)
    assert choose({1: None}, ERROR, 3) == (1,)


@pytest.mark.parametrize(
    "changes",
    [
        {"epochs": 3},
        {"epochs": 4, "batch_milestones": (0.4,)},
        {"epochs": None, "steps": 31, "evaluate_every": 4},
    ],
)
def test_choices_follow_evaluations(changes: dict[str, Any]) -> None:
    """The next evaluation of a plan is the one that its ranks make."""
    recipe = replace(digits(), train_samples=1437, **changes)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    evaluations = (EvaluationSchedule(samples=360, every=plan.evaluate_every or "epoch"),)
    sampler = Sampler(plan=plan, rank=0, train_samples=1437, evaluations=evaluations)
    made = [step + 1 for step in range(plan.total_steps) if sampler.evaluations_after(step)]
    for steps in range(1, plan.total_steps + 1):
        assert next_evaluation(plan, steps) == next(step for step in made if step >= steps)


def test_an_epoch_of_unknown_length_is_refused() -> None:
    """A choice after an epoch needs the number of training samples."""
    recipe = replace(digits(), epochs=None, steps=20, train_samples=None, evaluate_every=None)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    with pytest.raises(PlanError, match="evaluate_every"):
        next_evaluation(plan, 3)


def machine_with(gpus: int, cores: int) -> Machine:
    """Return this machine with other resources."""
    return replace(read_machine(), num_gpus=gpus, usable_cores=cores)


@pytest.mark.parametrize(
    ("env", "gpus", "nproc", "parallel", "expected"),
    [
        ({}, 4, 1, None, [("0",), ("1",), ("2",), ("3",)]),
        ({}, 4, 2, None, [("0", "1"), ("2", "3")]),
        ({}, 4, 1, 2, [("0",), ("1",)]),
        ({}, 1, 1, None, [("0",)]),
        ({"CUDA_VISIBLE_DEVICES": "5, 2,GPU-1a"}, 3, 1, 3, [("5",), ("2",), ("GPU-1a",)]),
    ],
)
def test_each_run_has_gpus_of_its_own(
    env: dict[str, str], gpus: int, nproc: int, parallel: int | None, expected: list[Any]
) -> None:
    """Runs that train at the same time get consecutive GPUs among those that are visible."""
    machine = machine_with(gpus, 64)
    shares = divide(machine, on_gpus=True, nproc_per_node=nproc, parallel=parallel, env=env)
    assert [share.gpus for share in shares] == expected
    assert shares[0].of(machine).num_gpus == nproc


@pytest.mark.parametrize(("gpus", "nproc", "parallel"), [(1, 1, 2), (4, 2, 3), (2, 3, None)])
def test_too_few_gpus_are_refused(gpus: int, nproc: int, parallel: int | None) -> None:
    """A sweep that asks for more GPUs than there are does not start."""
    machine = machine_with(gpus, 64)
    with pytest.raises(PlanError, match=f"{gpus} GPU"):
        divide(machine, on_gpus=True, nproc_per_node=nproc, parallel=parallel, env={})


def test_cores_are_divided() -> None:
    """Runs that train at the same time on CPUs share no core; a single one keeps all."""
    cores = sorted(os.sched_getaffinity(0))
    machine = machine_with(0, len(cores))
    one = divide(machine, on_gpus=False, nproc_per_node=1, parallel=None)
    assert [share.cores for share in one] == [()]
    shares = divide(machine, on_gpus=False, nproc_per_node=1, parallel=len(cores))
    assert [share.cores for share in shares] == [(core,) for core in cores]
    assert shares[0].of(machine).usable_cores == 1
