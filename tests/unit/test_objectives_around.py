"""Several objectives with averages, logged numbers, live schedules and a time to keep."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from small_gans import every, small_gan, train
from support import read_lines
from torch import Tensor, nn

from launcher import (
    Data,
    RecipeError,
    constant,
    linear,
    log,
    make_plan,
    plateau,
    read_machine,
    schedule_free,
    tail,
    torch_schedule,
)
from launcher.planning.timed_plan import timed_plan
from launcher.planning.timed_steps import TimedSteps
from launcher.recipes import gan
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest


def rows_of(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the rows of the steps in metrics.jsonl."""
    return [row for row in read_lines(run_dir.metrics) if "loss" in row]


@pytest.mark.parametrize("intervals", [(1, 1), (1, 3)])
def test_averages_hold_the_weights_of_all_objectives(
    tmp_path: Path, intervals: tuple[int, int]
) -> None:
    """The exported weights are the mean over the steps, each after the last turn of its step."""
    built = small_gan(averaging=tail(start=0.0), checkpoint_every=1, keep_checkpoints=20)
    built = replace(built, objectives=every(built, *intervals))
    run_dir = train(tmp_path, built, stop=StopRequest())
    weights: dict[str, list[Tensor]] = {}
    for checkpoint in list_checkpoints(run_dir):
        for shard in checkpoint.path.glob("*.safetensors"):
            for name, value in load_file(shard).items():
                weights.setdefault(name, []).append(value)
    exported = load_file(run_dir.model)
    for name, _ in small_gan().model().named_parameters():
        values = weights[f"model/{name}"]
        assert len(values) == 10
        torch.testing.assert_close(exported[name], torch.stack(values).mean(0))


def test_averaging_refuses_an_objective_that_averages_itself(tmp_path: Path) -> None:
    """An objective with schedule_free evaluates other weights, so an average is refused."""
    built = small_gan(averaging=tail())
    critic, actor = built.objectives
    built = replace(built, objectives=(critic, replace(actor, optimizer=schedule_free())))
    with pytest.raises(RecipeError, match="averaging"):
        train(tmp_path, built)


def logging_forward(model: nn.ModuleDict, batch: Any) -> Any:
    """Compare, and log the labels."""
    log("label", batch[1].sum(), len(batch[1]))
    return gan.compare(model, batch)


def logging_judge(model: nn.ModuleDict, batch: Any) -> Any:
    """Judge, and log the labels."""
    log("label", batch[1].sum(), len(batch[1]))
    return gan.judge_generated(model, batch)


def test_numbers_are_logged_by_the_turns(tmp_path: Path) -> None:
    """Each turn logs under its objective's name, each sample once, also the training metrics."""
    built = small_gan(micro_batch_size=5, train_metrics=("recognised",))
    critic, actor = every(built, 1, 3)
    built = replace(
        built,
        forward=logging_forward,
        objectives=(
            replace(critic, forward=None),
            replace(actor, forward=logging_judge),
        ),
    )
    run_dir = train(tmp_path, built)
    rows = rows_of(run_dir)
    labels = torch.cat([built.data().train[range(96)][1]]).double()
    for name, interval in (("discriminator", 1), ("generator", 3)):
        assert [f"train/{name}/label" in row for row in rows] == [
            step % interval == 0 for step in range(10)
        ]
    epoch = [row["train/discriminator/label"] for row in rows[:3]]
    assert sum(epoch) / 3 == pytest.approx(float(labels.mean()), rel=1e-6)
    assert all(0 <= row["train/discriminator/recognised"] <= 1 for row in rows)
    assert not any("train/generator/recognised" in row for row in rows)


def test_training_metrics_need_outputs_of_the_recipe() -> None:
    """If no objective computes what an evaluation computes in every step, they are refused."""
    built = small_gan()
    with pytest.raises(RecipeError, match="train_metrics") as raised:
        replace(built, objectives=every(built, 2, 1), train_metrics=("recognised",))
    assert "discriminator and generator" in str(raised.value)


def test_each_objective_has_a_live_schedule(tmp_path: Path) -> None:
    """A class of torch and a plateau drive the rates of their own objectives, also when resumed."""
    built = small_gan(evaluate_every=2, checkpoint_every=7)
    critic, actor = built.objectives
    samples = built.data().train
    built = replace(
        built,
        data=lambda: Data(train=samples, evaluation=samples),
        objectives=(
            replace(critic, schedule=torch_schedule("StepLR", step_size=4, gamma=0.5)),
            replace(actor, schedule=plateau("recognised:min", patience=1, threshold=2.0), lr=0.1),
        ),
    )
    plan = make_plan(built, read_machine(), nproc_per_node=1)
    assert [each.lr_start for each in plan.objectives] == [None, None]
    run_dir = train(tmp_path, built, stop=StopRequest())
    rows = rows_of(run_dir)
    of_critic = [row["train/discriminator/lr"] for row in rows]
    assert of_critic == pytest.approx([0.05] * 4 + [0.025] * 4 + [0.0125] * 2)
    of_actor = [row["train/generator/lr"] for row in rows]
    assert of_actor == pytest.approx([0.1] * 4 + [0.01] * 4 + [0.001] * 2), "none is an improvement"
    resumed = train(tmp_path, built, run_dir, start=ResumeFrom(step=7), stop=StopRequest())
    names = ("loss", "train/discriminator/lr", "train/generator/lr", "train/generator/loss")
    found = [[row[name] for name in names] for row in rows_of(resumed)]
    assert found == [[row[name] for name in names] for row in rows]


def test_a_plateau_of_an_unknown_metric_is_refused() -> None:
    """The schedule of an objective follows a metric of the recipe."""
    built = small_gan()
    critic, actor = built.objectives
    with pytest.raises(RecipeError, match="recognized"):
        replace(built, objectives=(critic, replace(actor, schedule=plateau("recognized:max"))))


def test_a_timed_plan_spans_the_schedules_of_all_objectives() -> None:
    """With the steps that fit in max_time, each objective's rate ends where its schedule ends."""
    built = small_gan(max_time="30min", schedule=linear())
    critic, actor = built.objectives
    built = replace(built, objectives=(critic, replace(actor, schedule=constant())))
    plan = make_plan(built, read_machine(), nproc_per_node=1)
    steps = TimedSteps(max_time="30min", limit=10, first_step=2, steps=5)
    planned = timed_plan(plan, built, steps)
    ends = [each.lr_end for each in planned.objectives]
    factor = planned.schedule_value_at(linear(), 4).factor
    assert ends == pytest.approx([0.05 * factor, 0.2])
    assert plan.objectives[0].lr_end != pytest.approx(ends[0])


def test_turns_are_in_the_history(tmp_path: Path) -> None:
    """What each turn measures is among the logged numbers of a run."""
    built = small_gan()
    run_dir = train(tmp_path, replace(built, objectives=every(built, 1, 3)))
    lines = rows_of(run_dir)
    assert {"train/generator/loss", "train/generator/lr", "train/generator/grad_norm"} <= set(
        lines[0]
    )
    assert "objectives" not in lines[0]
    assert "logged" not in lines[0]


def test_a_run_ends_with_its_best_weights(tmp_path: Path) -> None:
    """With keep_best the weights, and what is averaged, are those of the best checkpoint."""
    samples = small_gan().data().train
    built = small_gan(
        data=lambda: Data(train=samples, evaluation=samples),
        averaging=tail(start=0.0),
        evaluate_every=2,
        keep_best="loss:max",
        checkpoint_every=2,
    )
    run_dir = train(tmp_path, built, stop=StopRequest())
    losses = {
        row["step"]: row["evaluation"]["loss"]
        for row in read_lines(run_dir.metrics)
        if "evaluation" in row
    }
    best = max(losses, key=lambda step: losses[step])
    assert best < 10
    assert json.loads(run_dir.result.read_text())["weights_step"] == best
    until_best = replace(built, steps=best, keep_best=None)
    expected = load_file(train(tmp_path, until_best, stop=StopRequest()).model)
    found = load_file(run_dir.model)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
