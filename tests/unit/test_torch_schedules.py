"""`torch_schedule`, compared with PyTorch's schedulers in a plain loop."""

from __future__ import annotations

import warnings
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch.optim import SGD, lr_scheduler

from launcher import make_plan, read_machine, torch_schedule, warmup
from launcher.engine.data.sampler import Sampler
from launcher.engine.training.live_schedules import live_schedule
from launcher.errors import RecipeError, UsageError
from launcher.recipe.callspec import parse
from launcher.recipe.schedules import SCHEDULES, Schedule, linear
from launcher.recipe.unplanned_schedules import TORCH_SCHEDULERS
from launcher.recipes.digits import digits

LR, STEPS, PER_EPOCH = 0.3, 24, 4


def decay(count: int) -> float:
    """Return a factor, as a function that a script would have."""
    return 0.9**count


class Halving(lr_scheduler.LRScheduler):
    """A scheduler of a user's own."""

    def get_lr(self) -> list[float]:  # type: ignore[override]
        """Return half of the learning rates."""
        return [
            group["lr"] * (0.5 if self.last_epoch else 1.0) for group in self.optimizer.param_groups
        ]


def live(schedule: Schedule, **changes: Any) -> Schedule:
    """Return the schedule as a run of 24 steps in 6 epochs computes it."""
    recipe = replace(
        digits(),
        **{"lr": LR, "lr_batch_size": 8, "lr_rule": "none", "batch_size": 8, **changes},
        epochs=None,
        steps=STEPS,
        schedule=schedule,
    )
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    sampler = Sampler(plan=plan, rank=0, train_samples=8 * PER_EPOCH)
    return live_schedule(recipe, plan, sampler, has_evaluations=True)[0]


def path_of(schedule: Schedule, **changes: Any) -> list[tuple[float, float | None]]:
    """Return the learning rate and the momentum of each step of that run."""
    computed = live(schedule, **changes)
    values = [computed.at(step, STEPS) for step in range(STEPS)]
    return [(LR * value.factor, value.momentum) for value in values]


def script(make: Any, *, per: str = "step") -> list[tuple[float, float]]:
    """Return what a plain loop sets with the scheduler that `make` builds for its optimizer."""
    optimizer = SGD([torch.zeros(1, requires_grad=True)], lr=LR, momentum=0.9)
    scheduler = make(optimizer)
    path = []
    for step in range(STEPS):
        group = optimizer.param_groups[0]
        path.append((float(group["lr"]), float(group["momentum"])))
        optimizer.step()
        is_last_of_epoch = step % PER_EPOCH == PER_EPOCH - 1
        if step < STEPS - 1 and (per == "step" or is_last_of_epoch):
            scheduler.step()
    return path


ARGUMENTS: dict[str, dict[str, Any]] = {
    "ConstantLR": {"factor": 0.5, "total_iters": 3},
    "CosineAnnealingLR": {"T_max": 5, "eta_min": 1e-3},
    "CosineAnnealingWarmRestarts": {"T_0": 3, "T_mult": 2},
    "CyclicLR": {"base_lr": 0.01, "max_lr": 0.2, "step_size_up": 3, "mode": "triangular2"},
    "ExponentialLR": {"gamma": 0.8},
    "LambdaLR": {"lr_lambda": decay},
    "LinearLR": {"start_factor": 0.1, "total_iters": 4},
    "MultiStepLR": {"milestones": [2, 4], "gamma": 0.3},
    "MultiplicativeLR": {"lr_lambda": decay},
    "OneCycleLR": {"max_lr": 0.4, "total_steps": STEPS, "pct_start": 0.4},
    "PolynomialLR": {"total_iters": 5, "power": 2.0},
    "StepLR": {"step_size": 2, "gamma": 0.5},
}


def combined(name: str, optimizer: SGD | None) -> dict[str, Any]:
    """Return the arguments of SequentialLR or ChainedScheduler, for torch or for launcher."""
    parts: dict[str, Any] = {"LinearLR": {"total_iters": 2}, "StepLR": {"step_size": 3}}
    schedulers = [
        torch_schedule(part, **arguments)
        if optimizer is None
        else getattr(lr_scheduler, part)(optimizer, **arguments)
        for part, arguments in parts.items()
    ]
    return {"schedulers": schedulers, **({"milestones": [2]} if name == "SequentialLR" else {})}


@pytest.mark.parametrize("per", ["step", "epoch"])
@pytest.mark.parametrize("name", TORCH_SCHEDULERS)
def test_every_class_with_a_fixed_path_is_followed(name: str, per: str) -> None:
    """Each step has the learning rate that the class gives a plain loop, and its momentum."""

    def make(optimizer: SGD) -> Any:
        arguments = ARGUMENTS.get(name) or combined(name, optimizer)
        return getattr(lr_scheduler, name)(optimizer=optimizer, **arguments)

    expected = script(make, per=per)
    arguments = ARGUMENTS.get(name) or combined(name, None)
    for scheduler in (name, getattr(lr_scheduler, name)):
        path = path_of(torch_schedule(scheduler, per=per, **arguments))
        assert [lr for lr, _ in path] == pytest.approx([lr for lr, _ in expected], rel=1e-15)
        if name in ("OneCycleLR", "CyclicLR"):
            assert [momentum for _, momentum in path] == [momentum for _, momentum in expected]
        else:
            assert {momentum for _, momentum in path} == {None}


def test_every_class_is_known() -> None:
    """The classes of torch.optim.lr_scheduler are the known ones, the plateau and their base."""
    others = {"ReduceLROnPlateau", "LRScheduler"}
    assert {*TORCH_SCHEDULERS} == {*lr_scheduler.__all__} - others


def test_a_class_of_a_users_own_is_followed() -> None:
    """A subclass of LRScheduler is followed like those of torch."""
    expected = script(Halving)
    path = path_of(torch_schedule(Halving))
    assert [lr for lr, _ in path] == pytest.approx([lr for lr, _ in expected])


def test_what_a_script_repeats_may_be_left_out() -> None:
    """T_max and total_steps are the length of the run, and max_lr is the recipe's lr."""
    for per, count in (("step", STEPS), ("epoch", STEPS // PER_EPOCH)):
        explicit = torch_schedule("CosineAnnealingLR", per=per, T_max=count)
        assert path_of(torch_schedule("CosineAnnealingLR", per=per)) == path_of(explicit)
        explicit = torch_schedule("OneCycleLR", per=per, total_steps=count, max_lr=LR)
        assert path_of(torch_schedule("OneCycleLR", per=per)) == path_of(explicit)


def test_a_step_has_one_value() -> None:
    """The value of a step does not depend on which steps were asked for before, as on resuming."""
    schedule = torch_schedule("CosineAnnealingWarmRestarts", T_0=5)
    path, asked = path_of(schedule), live(schedule)
    for step in (7, 3, 3, 20, 0, 21):
        assert LR * asked.at(step, STEPS).factor == path[step][0]


def test_it_follows_a_warm_up() -> None:
    """A class counts its steps from the end of a warm-up."""
    path = path_of(warmup(torch_schedule("StepLR", step_size=2), steps=4, start_factor=0.5))
    values = [LR * (0.5 + 0.125 * step) for step in range(4)]
    values += [LR * 0.1 ** (step // 2) for step in range(STEPS - 4)]
    assert [lr for lr, _ in path] == pytest.approx(values)


def test_absolute_learning_rates_scale_with_the_batch() -> None:
    """eta_min is meant at lr_batch_size, so the path is the same at any batch, only scaled."""
    schedule = torch_schedule("CosineAnnealingLR", eta_min=0.01)
    for changes in ({}, {"lr_rule": "linear", "lr_batch_size": 4}):
        path = path_of(schedule, **changes)
        assert path[-1][0] > 0.01
        assert path == path_of(schedule)


def test_a_plan_knows_the_text_alone() -> None:
    """A plan computes no learning rate of a class of torch, and says so."""
    recipe = replace(digits(), schedule=torch_schedule("StepLR", step_size=3), train_samples=999)
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    assert (plan.lr_start, plan.lr_end, plan.lr_peak_step) == (None, None, None)
    assert plan.settings["schedule"] == "torch_schedule(scheduler='StepLR', step_size=3)"
    with pytest.raises(UsageError):
        recipe.schedule.at(0, 10)


@pytest.mark.parametrize(
    "text",
    [
        "torch_schedule('StepLR', step_size=3, per='epoch')",
        "warmup(torch_schedule('CosineAnnealingLR'), steps=3)",
        "torch_schedule('ChainedScheduler', schedulers=[torch_schedule('LinearLR')])",
    ],
)
def test_it_is_written_as_text(text: str) -> None:
    """The text of a schedule reads back as the same schedule, on the command line too."""
    schedule = parse(text, SCHEDULES, kind="schedule")
    assert parse(str(schedule), SCHEDULES, kind="schedule") == schedule
    assert len(path_of(schedule)) == STEPS  # type: ignore[arg-type]


def test_a_function_has_the_same_text_in_every_process() -> None:
    """Ranks compare schedules by their text, which holds no address."""
    schedule = torch_schedule("LambdaLR", lr_lambda=decay)
    assert str(schedule) == "torch_schedule(scheduler='LambdaLR', lr_lambda=<decay>)"
    assert not str(torch_schedule(Halving)).startswith("torch_schedule(scheduler='")


@pytest.mark.parametrize(
    ("scheduler", "arguments", "word"),
    [
        ("CosineAnealingLR", {}, "Did you mean CosineAnnealingLR"),
        ("ReduceLROnPlateau", {}, "plateau("),
        ("StepLR", {"step_size": 3, "per": "batch"}, "'batch'"),
        ("StepLR", {"step_size": 3, "last_epoch": 4}, "last_epoch"),
        ("StepLR", {"step_size": 3, "optimizer": None}, "optimizer"),
        ("SequentialLR", {"schedulers": [linear()], "milestones": [3]}, "linear()"),
        ("ChainedScheduler", {"schedulers": [torch_schedule("LinearLR", per="epoch")]}, "per"),
        (3, {}, "3"),
        (lr_scheduler.LRScheduler, {}, "LRScheduler"),
    ],
)
def test_a_wrong_schedule_is_refused(scheduler: Any, arguments: dict[str, Any], word: str) -> None:
    """An error names what is wrong, before torch is needed."""
    with pytest.raises(UsageError) as caught:
        torch_schedule(scheduler, **arguments)
    assert word in str(caught.value)


def test_epochs_within_a_warm_up_are_refused() -> None:
    """A warm-up in steps cannot be followed by a class that counts epochs."""
    with pytest.raises(UsageError, match="epoch"):
        warmup(torch_schedule("StepLR", step_size=3, per="epoch"))


@pytest.mark.parametrize(
    ("schedule", "word"),
    [
        (torch_schedule("StepLR"), "step_size"),
        (torch_schedule("StepLR", step_sise=3), "step_sise"),
        (torch_schedule("OneCycleLR", total_steps=STEPS - 1), "23"),
        (torch_schedule("LambdaLR", lr_lambda=lambda _: float("nan")), "nan"),
        (torch_schedule("LambdaLR", lr_lambda=lambda _: 1 / 0), "ZeroDivisionError"),
    ],
)
def test_a_class_that_refuses_its_arguments_ends_the_run_before_a_step(
    schedule: Schedule, word: str
) -> None:
    """The error of the class is the recipe's, with the schedule as it was written."""
    with pytest.raises(RecipeError, match=word):
        live(schedule)


def test_no_class_warns() -> None:
    """Following the classes prints no warning of torch."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        path_of(torch_schedule("SequentialLR", **combined("SequentialLR", None)))


def test_a_scheduler_itself_is_no_schedule() -> None:
    """A recipe that names a class of torch, or holds an object of it, is told what to write."""
    made = lr_scheduler.StepLR(SGD([torch.zeros(1)], lr=0.1), step_size=3)
    found: Any
    for found in (lr_scheduler.StepLR, made):
        with pytest.raises(RecipeError, match=r"torch_schedule\('StepLR', \.\.\.\)"):
            replace(digits(), schedule=found)
