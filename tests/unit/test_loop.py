"""The training loop in this process, compared with a plain PyTorch loop."""

from __future__ import annotations

import io
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support import read_lines
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import TensorDataset

from launcher import (
    Data,
    Recipe,
    RecipeError,
    TrainingError,
    adamw,
    constant,
    make_plan,
    one_cycle,
    read_machine,
    sgd,
)
from launcher.engine.backends.local import LocalBackend
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.seeds import derive
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.ranks.output import Output
from launcher.engine.run import TrainResult, train_rank
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

INPUTS = torch.randn(50, 4, generator=torch.Generator().manual_seed(1))
TARGETS = INPUTS @ torch.tensor([[1.0], [-2.0], [0.5], [0.0]]) + 0.3


def squared_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared errors."""
    return functional.mse_loss(outputs, batch[1], reduction="sum"), len(batch[1])


class SizelessSamples:
    """A data set whose length is no whole number."""

    def __len__(self) -> Any:
        return 40.0  # noqa: PLE0303

    def __getitem__(self, index: int) -> Any:
        return INPUTS[index], TARGETS[index]


def recipe(**changes: Any) -> Recipe:
    """Return a small regression recipe with some fields changed."""
    fields: dict[str, Any] = {
        "name": "line",
        "model": lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)),
        "data": lambda: Data(
            train=TensorDataset(INPUTS[:40], TARGETS[:40]),
            evaluation=TensorDataset(INPUTS[40:], TARGETS[40:]),
        ),
        "loss": squared_error,
        "batch_size": 16,
        "lr": 0.05,
        "lr_batch_size": 16,
        "epochs": 4,
        "train_samples": 40,
        "in_memory": True,
        "device": "cpu",
    }
    return Recipe(**fields | changes)


def train(
    tmp_path: Path, recipe: Recipe
) -> tuple[TrainResult, list[dict[str, Any]], dict[str, Tensor]]:
    """Train in this process; return the result, the steps' metrics and the weights."""
    folder = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
    folder.mkdir()
    run_dir = RunDir(folder)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    result = train_rank(recipe, plan, LocalBackend(recipe, plan), run_dir, output)
    assert result is not None
    rows = [row for row in read_lines(run_dir.metrics) if "loss" in row]
    return result, rows, load_file(run_dir.model)


def test_it_is_a_plain_pytorch_loop(tmp_path: Path) -> None:
    """Losses, gradient norms, learning rates and weights equal those of a plain PyTorch loop."""
    regression = recipe(optimizer=sgd(momentum=0.9, weight_decay=1e-3), max_grad_norm=0.5)
    _, rows, weights = train(tmp_path, regression)

    torch.manual_seed(0)
    model = regression.model()
    optimizer = SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
    scheduler = OneCycleLR(
        optimizer,
        0.05,
        total_steps=12,
        pct_start=0.45,
        div_factor=10,
        final_div_factor=1000,
        three_phase=True,
        anneal_strategy="linear",
    )
    expected: list[tuple[float, float, float]] = []
    for epoch in range(4):
        order = torch.from_numpy(Permutation(40, 0, epoch)(np.arange(40)))
        for indices in torch.split(order, 16):
            outputs = model(INPUTS[indices])
            loss = functional.mse_loss(outputs, TARGETS[indices], reduction="sum") / len(indices)
            torch.autograd.backward(loss)
            norm = nn.utils.clip_grad_norm_(model.parameters(), 0.5)
            lr = optimizer.param_groups[0]["lr"]
            optimizer.step()
            optimizer.zero_grad()
            if len(expected) < 11:
                scheduler.step()
            expected.append((loss.item(), norm.item(), lr))
    steps = [(row["loss"], row["grad_norm"], row["lr"]) for row in rows]
    assert steps == [pytest.approx(step, rel=1e-6) for step in expected]
    for name, weight in model.state_dict().items():
        assert torch.allclose(weights[name], weight, rtol=1e-6, atol=1e-8)


def test_groups_keep_their_ratio_and_momentum_cycles(tmp_path: Path) -> None:
    """The schedule scales learning rate and momentum of each group of a recipe's own optimizer."""
    written: list[tuple[float, float, float]] = []

    class RecordingAdamW(AdamW):
        def step(self, closure: Any = None) -> Any:
            slow, fast = self.param_groups
            written.append((slow["lr"], fast["lr"], slow["betas"][0]))
            return super().step(closure)

    def make(model: nn.Module, lr: float) -> Optimizer:
        first, last = list(model.children())[0::2]
        groups: list[dict[str, Any]] = [
            {"params": first.parameters(), "lr": lr / 10},
            {"params": last.parameters()},
        ]
        return RecordingAdamW(groups, lr=lr)

    train(tmp_path, recipe(optimizer=make))
    expected = [one_cycle().at(step, 12) for step in range(12)]
    assert [fast for _, fast, _ in written] == pytest.approx([0.05 * v.factor for v in expected])
    assert [slow * 10 for slow, _, _ in written] == pytest.approx([fast for _, fast, _ in written])
    assert [beta for _, _, beta in written] == pytest.approx([v.momentum for v in expected])


@pytest.mark.parametrize("optimizer", [sgd(), sgd(nesterov=True), adamw(weight_decay=0.1)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(tmp_path: Path, optimizer: Any, precision: Any) -> None:
    """Each optimizer reduces the loss tenfold in each precision, and the weights stay in fp32."""
    result, rows, weights = train(
        tmp_path, recipe(optimizer=optimizer, precision=precision, epochs=60, lr=0.02)
    )
    assert result.train_loss < rows[0]["loss"] / 10
    assert all(weight.dtype == torch.float32 for weight in weights.values())


def test_evaluations_follow_evaluate_every_and_the_last_step(tmp_path: Path) -> None:
    """An evaluation follows every 5th step and the last, with exact means over all samples."""
    result, _, weights = train(tmp_path, recipe(evaluate_every=5, micro_batch_size=3))
    run_dir = RunDir(tmp_path / "run0")
    steps = [row["step"] for row in read_lines(run_dir.metrics) if "evaluation" in row]
    assert steps == [5, 10, 12]
    model = recipe().model()
    model.load_state_dict(weights)
    loss = functional.mse_loss(model(INPUTS[40:]), TARGETS[40:]).item()
    assert result.evaluation == {"loss": pytest.approx(loss, rel=1e-6)}
    assert json.loads(run_dir.result.read_text())["evaluation"] == result.evaluation


def test_without_evaluation_data_nothing_is_evaluated(tmp_path: Path) -> None:
    """A recipe without evaluation data and without train_samples trains."""
    data = Data(train=TensorDataset(INPUTS, TARGETS))
    changes = {"data": lambda: data, "epochs": None, "steps": 7, "train_samples": None}
    result, rows, _ = train(tmp_path, recipe(**changes))
    assert result.evaluation == {}
    assert [row["epoch"] for row in rows] == [1, 1, 1, 1, 2, 2, 2]
    assert result.samples == 50 + 48


@pytest.mark.parametrize("epochs", [1, 2])
def test_a_failed_first_evaluation_costs_no_step(tmp_path: Path, epochs: int) -> None:
    """A run whose first evaluation fails resumes with that evaluation and ends as if it had not."""
    fails = True

    def sometimes(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        if fails and len(batch[0]) == 8:  # before the first step, 2 samples are tried
            raise ValueError("a mistake")
        return outputs.sum(), len(outputs)

    def normed() -> nn.Module:
        return nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    regression = recipe(
        model=normed,
        metrics={"sometimes": sometimes},
        epochs=epochs,
        data=lambda: Data(
            train=TensorDataset(INPUTS[:40], TARGETS[:40]),
            evaluation=TensorDataset(INPUTS[40:48], TARGETS[40:48]),
        ),
        micro_batch_size=8,
    )

    def take(run_dir: RunDir, start: ResumeFrom | None = None) -> None:
        plan = make_plan(regression, read_machine(), nproc_per_node=1)
        output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
        backend, stop = LocalBackend(regression, plan), StopRequest()
        train_rank(regression, plan, backend, run_dir, output, stop=stop, start=start)

    run_dirs = [RunDir(tmp_path / name) for name in ("whole", "halves")]
    for run_dir in run_dirs:
        run_dir.path.mkdir()
    whole, halves = run_dirs
    with pytest.raises(TrainingError, match="in the evaluation after step 3, on rank 0: a mistake"):
        take(halves)
    assert [checkpoint.step for checkpoint in list_checkpoints(halves)] == [3]
    fails = False
    take(halves, ResumeFrom())
    take(whole)
    weights, resumed = (load_file(run_dir.model) for run_dir in run_dirs)
    for name, weight in weights.items():
        assert torch.equal(weight, resumed[name]), name
    evaluations, losses = (
        [
            [(row["step"], row[key]) for row in read_lines(run_dir.metrics) if key in row]
            for run_dir in run_dirs
        ]
        for key in ("evaluation", "loss")
    )
    assert evaluations[0] == evaluations[1]
    assert [step for step, _ in evaluations[1]] == [3 * epoch for epoch in range(1, epochs + 1)]
    assert losses[0] == losses[1]


def test_frozen_parameters_stay(tmp_path: Path) -> None:
    """A layer that does not require gradients keeps its initial weights."""

    def model() -> nn.Module:
        layers: nn.Sequential = recipe().model()
        layers[0].requires_grad_(requires_grad=False)
        return layers

    _, _, weights = train(tmp_path, recipe(model=model))
    torch.manual_seed(0)
    assert torch.equal(weights["0.weight"], model().state_dict()["0.weight"])


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"loss": lambda *_: (torch.zeros(2), 2)}, RecipeError, r"\(a tensor of shape \(2,"),
        ({"loss": lambda *_: 3.0}, RecipeError, "returned a float"),
        ({"loss": lambda o, b: (o.sum().item(), len(b))}, RecipeError, r"a float, count\), from"),
        ({"loss": lambda o, b: (o.sum().detach(), len(b))}, RecipeError, "without a gradient"),
        ({"data": lambda: Data(train=SizelessSamples())}, RecipeError, "len.. raised TypeError"),
        ({"data": lambda: Data(train=[0] * 40, collate=cast("Any", "x"))}, RecipeError,
         "Data.collate=.*a str"),
        ({"model": lambda: nn.Linear(4, 1, device="meta")}, RecipeError, "meta device"),
        ({"optimizer": lambda _, lr: torch.optim.SGD([nn.Parameter(TARGETS)], lr)}, RecipeError,
         "updates 1 of 1 tensors that are not parameters"),
        ({"data": list}, RecipeError, "data function returned list"),
        ({"model": dict}, RecipeError, "model function returned a dict"),
        ({"optimizer": lambda *_: None}, RecipeError, "optimizer function .*NoneType"),
        ({"train_samples": 41}, RecipeError, "41 training samples, .* has 40"),
        ({"model": nn.Identity}, RecipeError, "no parameter that requires a gradient"),
        ({"lr": 1e12, "schedule": constant()}, TrainingError, "max_bad_steps=3"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_recipe_is_named(
    tmp_path: Path, changes: dict[str, Any], error: type[Exception], message: str
) -> None:
    """Each mistake raises an error of its kind, which names what was returned or set."""
    with pytest.raises(error, match=message):
        train(tmp_path, recipe(**changes))


def test_dropout_repeats_with_its_seed(tmp_path: Path) -> None:
    """Two runs with one seed are equal to the bit, dropout included; another seed differs."""

    def model() -> nn.Module:
        return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1))

    runs = [train(tmp_path, replace(recipe(model=model), seed=seed)) for seed in (0, 0, 1)]
    losses = [[row["loss"] for row in rows] for _, rows, _ in runs]
    assert losses[0] == losses[1]
    assert losses[0] != losses[2]
    assert not any(math.isnan(loss) for loss in losses[0])
    assert derive(0, 0) != derive(0, 1)


@pytest.mark.parametrize("spec", [sgd(momentum=0.9), adamw()])
def test_a_fused_kernel_skips_a_bad_step(spec: Any) -> None:
    """A fused optimizer step with a NaN gradient changes no weight, nor later steps."""
    regression = recipe(optimizer=spec)
    model = nn.Linear(4, 1)
    optimizer = make_optimizer(regression, model, 0.1)
    for is_finite in (False, True, False, True):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 if is_finite else math.nan)
        take_step(optimizer, regression, torch.tensor(is_finite))
        after = list(model.parameters())
        assert any(map(torch.equal, before, after)) is not is_finite
        assert all(parameter.isfinite().all() for parameter in after)
