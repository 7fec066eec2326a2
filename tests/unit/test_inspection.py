"""The inspection of a recipe in one process, and the findings of `launcher check` about it."""

from __future__ import annotations

from collections import UserDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, RecipeError, constant, make_plan, read_machine
from launcher.checks.check import findings_about
from launcher.checks.proof_summary import causes
from launcher.checks.prove import ParityRun
from launcher.engine.probes.inspection import Inspection, inspect_recipe
from launcher.findings import Finding
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

INPUTS = torch.randn(32, 8, generator=torch.Generator().manual_seed(0))
TARGETS = torch.arange(32) % 3


def summed(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies."""
    return functional.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


def averaged(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the mean of the cross-entropies, by mistake."""
    return functional.cross_entropy(outputs, batch[1]), len(batch[1])


def contrastive(outputs: Tensor, _: Any) -> tuple[Tensor, int]:
    """Return a loss in which each sample depends on all others."""
    places = torch.arange(len(outputs))
    return functional.cross_entropy(outputs @ outputs.T, places, reduction="sum"), len(outputs)


def in_training_only(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Raise for outputs without a gradient."""
    assert outputs.requires_grad
    return summed(outputs, batch)


def drawing(outputs: Tensor, _: Any) -> tuple[Tensor, int]:
    """Return the squared distance from random targets, as the loss of a diffusion model does."""
    targets = torch.randn_like(outputs)
    return functional.mse_loss(outputs, targets, reduction="sum"), len(outputs)


class Noisy(nn.Module):
    """A linear layer whose outputs are noisy in training and in evaluation.

    Args:
        noise: Returns the noise of outputs.
    """

    def __init__(self, noise: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layer, self.noise = nn.Linear(8, 3), noise

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.layer(x)
        return outputs + self.noise(outputs)


def numpy_noise(outputs: Tensor) -> Tensor:
    """Return noise from numpy's global generator."""
    import numpy as np

    return torch.as_tensor(np.random.standard_normal(outputs.shape)).float()


def recipe(**changes: Any) -> Recipe:
    """Return a small classification recipe with some fields changed."""
    fields: dict[str, Any] = {
        "name": "small",
        "model": lambda: nn.Linear(8, 3),
        "data": lambda: Data(train=TensorDataset(INPUTS, TARGETS)),
        "loss": summed,
        "batch_size": 16,
        "lr": 0.1,
        "lr_batch_size": 16,
        "steps": 4,
        "schedule": constant(),
        "in_memory": True,
        "device": "cpu",
    }
    return Recipe(**fields | changes)


def inspect(recipe: Recipe) -> tuple[Inspection, Plan]:
    """Return the inspection of a recipe and the plan of a run of it on two ranks."""
    plan = make_plan(recipe, read_machine(), nproc_per_node=2)
    return inspect_recipe(recipe, plan), plan


def check(recipe: Recipe) -> dict[str, Finding]:
    """Return the findings about a recipe by name."""
    return {finding.check: finding for finding in findings_about(*inspect(recipe))}


NOISES: dict[str, Callable[[Tensor], Tensor]] = {
    "large": torch.randn_like,
    "small": lambda outputs: 1e-6 * torch.randn_like(outputs),
    "same for all": lambda _: torch.rand(1),
    "dropout": lambda outputs: functional.dropout(outputs, 0.5),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize(
    ("loss", "is_sum", "is_mean"),
    [(summed, True, False), (averaged, False, True), (contrastive, False, False)],
)
def test_a_loss_is_judged_with_the_noise_held_fixed(
    noise: str, loss: Any, is_sum: bool, is_mean: bool
) -> None:
    """Noise in the model is found at any size, and changes nothing in what is found of the loss."""
    inspection, _ = inspect(recipe(model=lambda: Noisy(NOISES[noise]), loss=loss))
    assert inspection.random
    assert inspection.random_in_evaluation
    assert not inspection.loss_is_not_compared
    assert inspection.loss_is_mean == is_mean
    assert inspection.loss_is_not_sum == (not is_sum and not is_mean)


def test_noise_that_cannot_be_repeated_leaves_the_loss_unjudged() -> None:
    """Noise from numpy is found, and the loss is neither refused nor called a sum."""
    findings = check(recipe(model=lambda: Noisy(numpy_noise)))
    assert findings["loss"].level == "ok"
    assert "not tested" in findings["loss"].found
    assert findings["randomness"].level == "warning"


@pytest.mark.parametrize("loss", [drawing, in_training_only])
def test_other_losses_pass(loss: Any) -> None:
    """A loss that draws random numbers, or works in training only, is no failure."""
    findings = check(recipe(loss=loss))
    assert {finding.level for finding in findings.values()} <= {"ok", "warning"}
    assert ("randomness" in findings) == (loss is drawing)


@pytest.mark.parametrize(
    "model", [lambda: nn.Linear(8, 3), lambda: nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(3))]
)
def test_a_model_without_noise_is_not_random(model: Callable[[], nn.Module]) -> None:
    """Plain and lazy layers are inspected without a warning."""
    assert {finding.level for finding in check(recipe(model=model)).values()} == {"ok"}


def test_small_noise_is_a_cause_of_different_steps() -> None:
    """`launcher prove` names noise that is far below the tolerance of sums."""
    inspection, plan = inspect(recipe(model=lambda: Noisy(NOISES["small"])))
    (cause,) = causes(inspection, ParityRun(strategy="ddp", plan=plan, run_dir=RunDir(Path())))
    assert "random" in cause


@pytest.mark.parametrize(("strategy", "precision"), [("fsdp", "bf16"), ("fsdp", "fp32")])
def test_mixed_precision_is_a_cause_of_other_bits(strategy: Any, precision: str) -> None:
    """`launcher prove` says why exact FSDP in bf16 differs from DDP, and what to compare."""
    inspection, _ = inspect(recipe(model=lambda: nn.Linear(8, 3)))
    exact = recipe(strategy=strategy, precision=precision, virtual_ranks=2, exact=True)
    plan = make_plan(exact, read_machine(), nproc_per_node=2)
    found = causes(inspection, ParityRun(strategy=strategy, plan=plan, run_dir=RunDir(Path())))
    assert [precision in cause for cause in found] == [True] * (precision == "bf16")


def normed() -> nn.Module:
    """Return a model with BatchNorm."""
    return nn.Sequential(nn.BatchNorm1d(8), nn.Linear(8, 3))


@pytest.mark.parametrize(
    ("settings", "remedy"),
    [
        ({}, "sync_batchnorm=true"),
        ({"sync_batchnorm": True}, None),
        ({"sync_batchnorm": True, "micro_batch_size": 4}, "micro_batch_size"),
    ],
)
def test_batch_norm_is_a_warning_unless_it_is_exact(
    settings: dict[str, Any], remedy: str | None
) -> None:
    """Statistics over the whole batch of all ranks need no remedy, and none advises what is set."""
    finding = check(recipe(model=normed, **settings)).get("BatchNorm")
    assert (finding is None) == (remedy is None)
    if finding is not None and remedy is not None:
        assert remedy in finding.remedy


def test_virtual_ranks_are_the_remedy_for_batch_norm_and_dropout() -> None:
    """The warnings about BatchNorm and dropout name virtual_ranks, and are gone once it is set."""

    def dropped() -> nn.Module:
        return nn.Sequential(normed(), nn.Dropout(0.5))

    findings = check(recipe(model=dropped))
    assert "virtual_ranks" in findings["BatchNorm"].remedy
    assert "virtual_ranks" in findings["randomness"].remedy
    assert not {"BatchNorm", "randomness"} & check(recipe(model=dropped, virtual_ranks=2)).keys()


@dataclass
class Fields:
    """A batch whose parts are attributes."""

    x: Any


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"loss": lambda o, b: (o.sum().item(), len(b))}, "(a float, count)"),
        ({"loss": lambda o, b: (o.sum().detach(), len(b))}, "without a gradient"),
        ({"data": lambda: (INPUTS, TARGETS), "train_samples": 32}, "returned tuple"),
    ],
)
def test_a_function_with_another_result_is_refused(changes: dict[str, Any], fragment: str) -> None:
    """A loss without a gradient and data of another type are refused with what was returned."""
    with pytest.raises(RecipeError) as caught:
        inspect(recipe(**changes))
    assert fragment in str(caught.value)


@pytest.mark.parametrize(
    ("collate", "fragment"),
    [
        (lambda samples: {"x": torch.stack(samples)}, "model(batch['x'])"),
        (lambda samples: UserDict(x=torch.stack(samples)), "model(batch['x'])"),
        (torch.stack, "model(batch)"),
        (lambda samples: Fields(torch.stack(samples)), "Fields object"),
    ],
)
def test_a_missing_forward_is_refused(collate: Any, fragment: str) -> None:
    """A batch without a first element is refused, with the forward that the recipe needs."""
    data = Data(train=list(INPUTS), collate=collate)
    with pytest.raises(RecipeError) as caught:
        check(recipe(data=lambda: data))
    assert fragment in str(caught.value)
    assert "forward" in str(caught.value)


class Scaled(nn.Linear):
    """A layer with a scalar parameter, as the temperature of CLIP is."""

    def __init__(self) -> None:
        super().__init__(8, 3)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.scale


@pytest.mark.parametrize(
    ("changes", "fragment"),
    [
        ({"optimizer": lambda m, lr: torch.optim.Adafactor(m.parameters(), lr=lr)}, "strategy=ddp"),
        ({"optimizer": lambda m, lr: torch.optim.LBFGS(m.parameters(), lr=lr)}, "LBFGS"),
        ({"model": Scaled}, "shape (1,)"),
    ],
)
def test_what_the_strategy_cannot_train_is_found(changes: dict[str, Any], fragment: str) -> None:
    """An optimizer or a parameter that the strategy would refuse in a run is refused by `check`."""
    with pytest.raises(RecipeError) as caught:
        check(recipe(strategy="zero1", **changes))
    assert fragment in str(caught.value)


def test_evaluation_is_tried() -> None:
    """Mistakes in forward and in metrics that only evaluation samples show are failures."""

    def in_training(model: nn.Module, batch: Any) -> Any:
        if len(batch) == 3:
            raise ValueError("no evaluation")
        return model(batch[0])

    samples = TensorDataset(INPUTS, TARGETS)
    data = Data(train=samples, evaluation=TensorDataset(INPUTS, TARGETS, TARGETS))
    findings = check(recipe(data=lambda: data, forward=in_training))
    assert findings["evaluation"].level == "failure"
    assert "ValueError: no evaluation" in findings["evaluation"].found
    data = Data(train=samples, evaluation=samples)
    findings = check(recipe(data=lambda: data, metrics={"mean": lambda o, _: o.mean()}))
    assert findings["metrics"].level == "failure"
    assert findings["metrics"].found.startswith("mean: ")
