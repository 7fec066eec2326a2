"""Evaluation sets by name: what they may be called, when each is evaluated, what is recorded."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import read_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from launcher import Data, Evaluation, Recipe, RecipeError, constant, make_plan, read_machine
from launcher.console.progress import metrics_text
from launcher.engine.backends.local import LocalBackend
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.planning.plan import Plan
from launcher.report.run_page import evaluation_curves, metric_names
from launcher.runs.history import History, evaluation_set_names, read_evaluation
from launcher.runs.job import ResumeFrom
from launcher.runs.run_record import RunRecord, write_run
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

INPUTS = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3


def samples(start: int, stop: int) -> TensorDataset:
    """Return some of the samples."""
    return TensorDataset(INPUTS[start:stop], TARGETS[start:stop])


def squared_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared errors, and the number of samples."""
    return functional.mse_loss(outputs, batch[1], reduction="sum"), len(batch[1])


def absolute_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of absolute errors, and the number of samples."""
    return functional.l1_loss(outputs, batch[1], reduction="sum"), len(batch[1])


def make_recipe(evaluation: Any, **changes: Any) -> Recipe:
    """Return a regression of 10 steps, 5 in each epoch."""
    fields: dict[str, Any] = {
        "name": "judged",
        "model": lambda: nn.Linear(4, 1),
        "data": lambda: Data(train=samples(0, 40), evaluation=evaluation),
        "loss": squared_error,
        "metrics": {"error": absolute_error},
        "schedule": constant(),
        "batch_size": 8,
        "lr": 0.05,
        "lr_batch_size": 8,
        "epochs": 2,
        "train_samples": 40,
        "in_memory": True,
        "device": "cpu",
        "checkpoint_every": 4,
    }
    return Recipe(**fields | changes)


def train(recipe: Recipe, folder: Path, **options: Any) -> list[dict[str, Any]]:
    """Train in this process; return the evaluations that are recorded."""
    folder.mkdir(exist_ok=True)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    backend = LocalBackend(recipe, plan)
    train_rank(recipe, plan, backend, RunDir(folder), output, stop=StopRequest(), **options)
    return [row for row in read_lines(folder / "metrics.jsonl") if "evaluation" in row]


def stacked(each: list[Any]) -> list[Tensor]:
    """Return a list of samples as a batch."""
    return [torch.stack(column) for column in zip(*each, strict=True)]


SETS = {
    "dev": samples(40, 53),
    "test.1": Evaluation(samples(53, 60), every="end"),
    "often": Evaluation(samples(40, 42), every=2, collate=stacked),
    "epochs": Evaluation(samples(42, 43), every="epoch"),
}


def test_each_set_has_its_own_schedule(tmp_path: Path) -> None:
    """Each set is evaluated when its schedule says so, and all are after the last step."""
    rows = train(make_recipe(SETS, evaluate_every=3), tmp_path / "run")
    evaluated = {row["step"]: evaluation_set_names(row["evaluation"]) for row in rows}
    assert evaluated == {
        2: ["often"],
        3: ["dev"],
        4: ["often"],
        5: ["epochs"],
        6: ["dev", "often"],
        8: ["often"],
        9: ["dev"],
        10: ["dev", "test.1", "often", "epochs"],
    }
    names = {f"{name}/{metric}" for name in SETS for metric in ("loss", "error")}
    result = json.loads((tmp_path / "run/result.json").read_text())
    assert result["evaluation"].keys() == names
    assert result["evaluation"] == rows[-1]["evaluation"]


def test_a_named_set_has_the_values_of_an_unnamed_one(tmp_path: Path) -> None:
    """Loss and metrics of a set, and the steps, are those of a run with this set alone."""
    one = train(make_recipe(samples(40, 53)), tmp_path / "one")
    both = train(make_recipe({"dev": samples(40, 53), "b": samples(0, 5)}), tmp_path / "both")
    assert [row["evaluation"].keys() for row in one] == [{"loss", "error"}] * 2
    assert [
        {name.removeprefix("dev/"): v for name, v in row["evaluation"].items() if name[0] == "d"}
        for row in both
    ] == [row["evaluation"] for row in one]


def test_a_missed_evaluation_is_made_up_for(tmp_path: Path) -> None:
    """A resumed run evaluates the sets that were due after its checkpoint, and no other one."""
    recipe = make_recipe(SETS, evaluate_every=3)
    whole = train(recipe, tmp_path / "whole")
    train(recipe, tmp_path / "run", last_step=7)
    metrics = RunDir(tmp_path / "run").metrics
    lines = [line for line in read_lines(metrics) if (line["step"], "loss" in line) < (4, False)]
    metrics.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert read_evaluation(RunDir(tmp_path / "run"), 4) == {}
    assert train(recipe, tmp_path / "run", start=ResumeFrom(step=4)) == whole


def test_workers_read_every_set(tmp_path: Path) -> None:
    """DataLoader workers read the sets ahead with the same values."""
    recipe = make_recipe(SETS, evaluate_every=3)
    expected = train(recipe, tmp_path / "alone")
    assert train(replace(recipe, in_memory=False, num_workers=2), tmp_path / "two") == expected


@pytest.mark.parametrize(
    ("evaluation", "fragment"),
    [
        ({"dev/1": samples(0, 3)}, "'dev/1'"),
        ({"": samples(0, 3)}, "''"),
        ({"train": samples(0, 3)}, "'train'"),
        ({}, "found none"),
    ],
)
def test_a_wrong_name_is_refused(evaluation: Mapping[str, Any], fragment: str) -> None:
    """Names with a slash, an empty name, the name train and an empty mapping are refused."""
    with pytest.raises(RecipeError, match=fragment):
        Data(train=samples(0, 3), evaluation=evaluation)


@pytest.mark.parametrize("every", [0, -1, "never", 1.5, True])
def test_a_wrong_schedule_is_refused(every: Any) -> None:
    """A schedule is a positive number of steps, epoch or end."""
    with pytest.raises(RecipeError, match=r"Evaluation\(every=\.\.\.\)"):
        Evaluation(samples(0, 3), every=every)


def test_an_empty_set_is_named(tmp_path: Path) -> None:
    """A set without samples is refused before the first step by its name."""
    recipe = make_recipe({"dev": samples(0, 3), "test": samples(3, 3)})
    with pytest.raises(RecipeError, match="test evaluation data is empty"):
        train(recipe, tmp_path / "run")


@pytest.mark.parametrize(("ranks", "virtual"), [(1, None), (3, None), (2, 5), (4, 5)])
def test_each_sample_is_visited_once(ranks: int, virtual: int | None) -> None:
    """Over all ranks, an evaluation takes each sample of a set once, in the data's order."""
    recipe = make_recipe(None, micro_batch_size=2, virtual_ranks=virtual)
    plan: Plan = make_plan(recipe, read_machine(), nproc_per_node=ranks)
    schedules = (
        EvaluationSchedule(name="a", samples=13),
        EvaluationSchedule(name="b", samples=2, every=3),
    )
    samplers = [
        Sampler(plan=plan, rank=rank, train_samples=40, evaluations=schedules)
        for rank in range(ranks)
    ]
    for schedule in schedules:
        requests = [list(sampler.evaluation([schedule])) for sampler in samplers]
        assert {len(own) for own in requests} == {samplers[0].evaluation_steps(schedule)}
        weighted = [each for own in requests for each in own if each.has_weight]
        assert {each.split for each in weighted} == {f"evaluation/{schedule.name}"}
        taken = sorted(index for each in weighted for index in each.indices)
        assert taken == list(range(schedule.samples))


def test_history_keeps_sets_apart(tmp_path: Path) -> None:
    """The latest value of each metric, and a curve for each set, are read from the run folder."""
    recipe = make_recipe(SETS, evaluate_every=3)
    rows = train(recipe, tmp_path / "run")
    run_dir = RunDir(tmp_path / "run")
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    write_run(run_dir, RunRecord(recipe="judged.py:judged", plan=plan.to_dict()))
    history = History(run_dir)
    assert history.latest_evaluation == {
        name: value for row in rows for name, value in row["evaluation"].items()
    }
    assert metric_names([history]) == ["error"]
    curves = list(evaluation_curves(history, "error"))
    assert {curve.name: list(curve.xs) for curve in curves} == {
        "often": [2, 4, 6, 8, 10],
        "dev": [3, 6, 9, 10],
        "epochs": [5, 10],
        "test.1": [10],
    }


def test_metrics_are_shown_set_by_set() -> None:
    """The line of metrics has the sets in their order, and the loss last in each."""
    values = {"dev/loss": 1.0, "dev/b": 2.0, "dev/a": 3.0, "a/loss": 4.0, "a/c/d": 5.0}
    assert metrics_text(values).split()[::2] == ["dev/a", "dev/b", "dev/loss", "a/c/d", "a/loss"]
    assert metrics_text({"loss": 1.0, "b/c": 2.0}).split()[::2] == ["b/c", "loss"]


@pytest.mark.parametrize("place", ["train", "evaluation", "evaluation['dev']"])
def test_a_loader_is_refused(place: str) -> None:
    """A DataLoader in place of a data set is refused by the name of its argument."""
    loader = DataLoader(samples(0, 40), batch_size=8)
    values: dict[str, Any] = {"train": samples(0, 40), place: loader}
    if place not in ("train", "evaluation"):
        values = {"train": samples(0, 40), "evaluation": {"dev": Evaluation(loader)}}
    with pytest.raises(RecipeError) as caught:
        Data(**values)
    assert f"Data({place}=...)" in str(caught.value)
    assert "DataLoader" in str(caught.value)
