"""The best checkpoint and the early end of a run: what is kept, resumed, and refused."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support import read_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from launcher import (
    Data,
    Evaluation,
    Recipe,
    RecipeError,
    TrainingError,
    all_predictions,
    constant,
    make_plan,
    read_machine,
)
from launcher.engine.backends.local import LocalBackend
from launcher.engine.ranks.output import Output
from launcher.engine.run import TrainResult, train_rank
from launcher.engine.saving.checkpoint_tensors import StoredState
from launcher.errors import CheckpointError
from launcher.runs.best import (
    BestEvaluations,
    best_evaluations,
    find_best_checkpoint,
    find_best_checkpoints,
)
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.final_result import find_result
from launcher.runs.job import ResumeFrom
from launcher.runs.manifest import save_manifest
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

INPUTS = torch.randn(30, 4, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS.sum(1, keepdim=True)

SCORES = (3.0, 5.0, 4.0, 5.0, 6.0, 2.0, 1.0, 0.0, 6.0, 6.0)
"""The score after each step of a run that is evaluated after every step."""


def tracked(mode: str = "max", kept: int = 1, stop_after: int | None = None) -> BestEvaluations:
    """Return the best evaluations of a run that has none."""
    return BestEvaluations(keep_best=f"score:{mode}", num_kept=kept, stop_after=stop_after)


def test_the_best_are_kept_in_order() -> None:
    """Larger or smaller values are better; among equal ones the earlier is, and NaN never is."""
    values = [math.nan, *SCORES]
    largest, smallest = tracked("max", 3), tracked("min", 2)
    are_best = [largest.add(step, {"score": v}) for step, v in enumerate(values, start=1)]
    for step, value in enumerate(values, start=1):
        smallest.add(step, {"score": value})
    assert largest.kept == [(6, 6.0), (10, 6.0), (11, 6.0)]
    assert smallest.kept == [(9, 0.0), (8, 1.0)]
    assert are_best == [False, True, True, True, True, True, False, False, False, True, True]


def test_evaluations_without_improvement_end_a_run() -> None:
    """Only evaluations of the metric's set count, and an equal value is no improvement."""
    best = BestEvaluations(keep_best="dev/score:min", num_kept=1, stop_after=2)
    ended = []
    for step, value in ((1, 1.0), (2, 0.5), (3, 0.5), (3, 9.0), (4, math.nan)):
        best.add(step, {"dev/loss": 0.0, "dev/score": value})
        best.add(step, {"test/loss": 0.0})
        ended.append(best.has_ended)
    assert ended == [False, False, False, False, True]  # step 3 was known already
    assert best.result().ended_after == 2
    with pytest.raises(RecipeError, match="Did you mean dev/scores"):
        best.add(5, {"dev/loss": 0.0, "dev/scores": 1.0})


def test_the_state_continues(tmp_path: Path) -> None:
    """The state of a checkpoint gives the same evaluations, and that of another metric none."""
    recipe = make_recipe(keep_best="score:max", best_checkpoints=2, stop_after=9)
    best = best_evaluations(recipe, None)
    assert best is not None
    for step, value in enumerate(SCORES, start=1):
        best.add(step, {"score": value})
    assert best_evaluations(recipe, best.state()) == best
    other = best_evaluations(replace(recipe, keep_best="loss:min"), best.state())
    assert other is not None
    assert (other.kept, other.step) == ([], 0)
    assert best_evaluations(make_recipe(), best.state()) is None
    with pytest.raises(CheckpointError, match="no best checkpoint"):
        find_best_checkpoint(RunDir(tmp_path))


def squared_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared errors, and the number of samples."""
    return functional.mse_loss(outputs, batch[1], reduction="sum"), len(batch[1])


def make_recipe(scores: Sequence[float] = (), **changes: Any) -> Recipe:
    """Return a recipe of 10 steps whose metric has given values."""
    remaining = iter(scores)

    def score(_: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        is_trial = len(batch[0]) < 5  # before the first step, and in the other set
        return torch.tensor(0.0 if is_trial else next(remaining)), 1

    fields: dict[str, Any] = {
        "name": "scored",
        "model": lambda: nn.Linear(4, 1),
        "data": lambda: Data(
            train=TensorDataset(INPUTS[:20], TARGETS[:20]),
            evaluation=TensorDataset(INPUTS[20:25], TARGETS[20:25]),
        ),
        "loss": squared_error,
        "metrics": {"score": score},
        "schedule": constant(),
        "batch_size": 10,
        "micro_batch_size": 5,
        "lr": 0.05,
        "lr_batch_size": 10,
        "steps": 10,
        "evaluate_every": 1,
        "train_samples": 20,
        "in_memory": True,
        "device": "cpu",
        "checkpoint_every": 1000,
        "keep_checkpoints": 1,
    }
    return Recipe(**fields | changes)


def train(recipe: Recipe, folder: Path, **options: Any) -> TrainResult:
    """Train in this process; return the result."""
    folder.mkdir(exist_ok=True)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    backend = LocalBackend(recipe, plan)
    result = train_rank(
        recipe, plan, backend, RunDir(folder), output, stop=StopRequest(), **options
    )
    assert result is not None
    return result


def steps_in(folder: Path) -> list[int]:
    """Return the steps of a run's checkpoints, the newest first."""
    return [checkpoint.step for checkpoint in list_checkpoints(RunDir(folder))]


def check_final_weights(folder: Path, step: int) -> None:
    """Assert that the final weights are those of the checkpoint of a step."""
    checkpoint = next(each for each in list_checkpoints(RunDir(folder)) if each.step == step)
    state = StoredState(checkpoint, checkpoint.read_manifest())
    for name, weight in load_file(RunDir(folder).model).items():
        saved = {f"model/{name}": torch.empty_like(weight)}
        state.read(saved)
        assert torch.equal(saved[f"model/{name}"], weight)


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    """The run ends with the weights of the best step, whose checkpoint stays besides the newest."""
    result = train(make_recipe(SCORES, keep_best="score:max"), tmp_path)
    assert (result.steps, result.weights_step) == (10, 5)
    assert result.best is not None
    assert (result.best.step, result.best.value, result.best.ended_after) == (5, 6.0, None)
    assert steps_in(tmp_path) == [10, 5]
    check_final_weights(tmp_path, 5)
    stored = find_result(RunDir(tmp_path))
    assert stored is not None
    assert (stored.best, stored.weights_step) == (result.best, 5)
    assert find_best_checkpoint(RunDir(tmp_path)).step == 5


def test_several_best_checkpoints_are_kept(tmp_path: Path) -> None:
    """`best_checkpoints` are kept besides the newest ones, the best first."""
    recipe = make_recipe(SCORES, keep_best="score:min", best_checkpoints=3)
    assert train(recipe, tmp_path).weights_step == 8
    assert steps_in(tmp_path) == [10, 8, 7, 6]
    assert [each.step for each in find_best_checkpoints(RunDir(tmp_path))] == [8, 7, 6]


def test_without_keep_best_nothing_changes(tmp_path: Path) -> None:
    """Without the setting the weights are the last ones, and no checkpoint is forced."""
    result = train(make_recipe(SCORES), tmp_path)
    assert (result.weights_step, result.best) == (10, None)
    assert steps_in(tmp_path) == [10]
    check_final_weights(tmp_path, 10)


def test_a_run_ends_early(tmp_path: Path) -> None:
    """A run ends after `stop_after` evaluations without improvement, and is then finished."""
    recipe = make_recipe(SCORES, keep_best="score:max", stop_after=3)
    result = train(recipe, tmp_path)
    assert (result.steps, result.weights_step) == (8, 5)
    assert result.best is not None
    assert result.best.ended_after == 3
    assert steps_in(tmp_path) == [8, 5]
    assert json.loads(RunDir(tmp_path).result.read_text())["steps"] == 8


@pytest.mark.parametrize(
    ("interrupted", "lost"),
    [
        (1, "note"),
        (4, ""),
        (6, ""),
        (7, ""),
        (8, ""),
        (8, "note"),
        (5, "evaluation"),
        (8, "evaluation"),
    ],
)
def test_an_interrupted_run_ends_as_if_it_had_not_been(
    tmp_path: Path, interrupted: int, lost: str
) -> None:
    """The best evaluations survive an interruption, also one before they are noted or made."""
    changes: dict[str, Any] = {"keep_best": "score:max", "stop_after": 3, "checkpoint_every": 1}
    whole = train(make_recipe(SCORES, **changes), tmp_path / "whole")
    folder = tmp_path / "run"
    train(make_recipe(SCORES, **changes), folder, last_step=interrupted)
    newest = list_checkpoints(RunDir(folder))[0]
    assert newest.step == interrupted
    if lost:
        before = BestEvaluations(keep_best="score:max", num_kept=1, stop_after=3)
        for step, value in enumerate(SCORES[: interrupted - 1], start=1):
            before.add(step, {"score": value})
        manifest = newest.read_manifest()
        values = manifest.values.copy()
        values["best"] = before.state()
        save_manifest(newest.path, replace(manifest, values=values))
    if lost == "evaluation":
        metrics = RunDir(folder).metrics
        rows = read_lines(metrics)
        kept = [row for row in rows if row["step"] < interrupted or "evaluation" not in row]
        metrics.write_text("".join(json.dumps(row) + "\n" for row in kept))
    is_repeated = lost == "evaluation" or interrupted == 8
    scores = SCORES[interrupted - is_repeated :]
    resumed = train(make_recipe(scores, **changes), folder, start=ResumeFrom())
    assert resumed.best == whole.best
    assert (resumed.steps, resumed.weights_step) == (whole.steps, whole.weights_step)
    assert steps_in(folder) == steps_in(tmp_path / "whole")
    models = [load_file(RunDir(each).model) for each in (folder, tmp_path / "whole")]
    assert all(torch.equal(weight, models[1][name]) for name, weight in models[0].items())


def test_an_earlier_checkpoint_keeps_its_best_one(tmp_path: Path) -> None:
    """The best checkpoint of each of the newest ones stays, so that any of them can be resumed."""
    changes: dict[str, Any] = {"keep_best": "score:max", "checkpoint_every": 1}
    scores = (5.0, 1.0, 1.0, 6.0, 1.0)
    recipe = make_recipe(scores, keep_checkpoints=3, steps=5, **changes)
    train(recipe, tmp_path, last_step=4)
    assert steps_in(tmp_path) == [4, 3, 2, 1]
    again = make_recipe((0.0, 0.0), keep_checkpoints=3, steps=5, **changes)
    result = train(again, tmp_path, start=ResumeFrom(step=3))
    assert (result.weights_step, result.best and result.best.value) == (1, 5.0)
    check_final_weights(tmp_path, 1)


def test_a_damaged_best_checkpoint_is_reported(tmp_path: Path) -> None:
    """The next best checkpoint gives the weights where the best one cannot be read."""
    changes: dict[str, Any] = {"keep_best": "score:max", "best_checkpoints": 2}
    scores = (5.0, 6.0, 1.0)
    train(make_recipe(scores, steps=4, **changes), tmp_path, last_step=3)
    best, second = find_best_checkpoints(RunDir(tmp_path))
    assert (best.step, second.step) == (2, 1)
    shard = next(best.path.glob("*.safetensors"))
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    result = train(make_recipe((0.0,), steps=4, **changes), tmp_path, start=ResumeFrom())
    assert result.weights_step == 1
    check_final_weights(tmp_path, 1)


def test_the_other_sets_are_evaluated_at_an_early_end(tmp_path: Path) -> None:
    """Every set is evaluated after the step at which a run ends, with workers as well."""
    sets = {
        "dev": TensorDataset(INPUTS[20:25], TARGETS[20:25]),
        "test": Evaluation(TensorDataset(INPUTS[25:28], TARGETS[25:28]), every="end"),
    }
    recipe = make_recipe(
        (1.0, 1.0, 1.0),
        data=lambda: Data(train=TensorDataset(INPUTS[:20], TARGETS[:20]), evaluation=sets),
        keep_best="dev/score:max",
        stop_after=2,
        in_memory=False,
        num_workers=1,
    )
    result = train(recipe, tmp_path)
    assert (result.steps, result.weights_step) == (3, 1)
    assert list(result.evaluation) == ["dev/loss", "dev/score", "test/loss", "test/score"]
    rows = [row for row in read_lines(RunDir(tmp_path).metrics) if "evaluation" in row]
    assert [row["step"] for row in rows] == [1, 2, 3, 3]


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"keep_best": "scor:max"}, "Did you mean score"),
        ({"keep_best": "dev/los:min"}, "Did you mean dev/loss"),
        ({"keep_best": "score"}, "the name of a metric and max or min"),
        ({"keep_best": "score:largest"}, "the name of a metric and max or min"),
        ({"keep_best": ":max"}, "the name of a metric and max or min"),
        ({"stop_after": 3}, "needs keep_best"),
        ({"best_checkpoints": 3}, "needs keep_best"),
        ({"keep_best": "score:max", "stop_after": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_refused(changes: dict[str, Any], fragment: str) -> None:
    """An unknown metric, another form and a setting without keep_best are refused at once."""
    with pytest.raises(RecipeError, match=fragment):
        make_recipe(**changes)


@pytest.mark.parametrize(
    ("evaluation", "keep_best", "fragment"),
    [
        (None, "score:max", "no evaluation set"),
        ({"dev": 1, "test": 1}, "score:max", "Did you mean dev/score|dev/loss, dev/score"),
        ({"dev": 1, "test": 1}, "tst/score:max", "Did you mean test/score"),
        (1, "dev/loss:min", "no evaluation gives a metric called dev/loss"),
    ],
)
def test_a_metric_of_no_set_is_refused(
    tmp_path: Path, evaluation: Any, keep_best: str, fragment: str
) -> None:
    """A metric that no evaluation set has is refused before the first step."""
    held_out = TensorDataset(INPUTS[20:25], TARGETS[20:25])
    sets = held_out if evaluation == 1 else evaluation and dict.fromkeys(evaluation, held_out)
    train_set = TensorDataset(INPUTS[:20], TARGETS[:20])
    recipe = make_recipe(data=lambda: Data(train=train_set, evaluation=sets), keep_best=keep_best)
    with pytest.raises(RecipeError, match=fragment):
        train(recipe, tmp_path)
    assert not RunDir(tmp_path).metrics.exists()


class Several:
    """A metric over all predictions that computes two numbers."""

    def reset(self) -> None:
        """Forget all samples."""

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Take samples."""

    def compute(self) -> dict[str, float]:
        """Return two numbers."""
        return {"f1": 0.5, "recall": 0.25}


def test_a_value_of_a_metric_with_several(tmp_path: Path) -> None:
    """One of several values can decide; an unknown one is found at the first evaluation."""
    changes: dict[str, Any] = {"metrics": {"several": all_predictions(Several)}, "steps": 2}
    result = train(make_recipe(keep_best="several/recall:max", **changes), tmp_path / "run")
    assert result.best is not None
    assert (result.best.step, result.best.value) == (1, 0.25)
    with pytest.raises(TrainingError, match="Did you mean several/recall"):
        train(make_recipe(keep_best="several/recal:max", **changes), tmp_path / "wrong")
    assert steps_in(tmp_path / "wrong") == [1]
