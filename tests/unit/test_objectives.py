"""Recipes with several objectives: what they plan, what they refuse, and the steps they take."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from examples import LAPTOP, recipe
from safetensors.torch import load_file
from small_gans import every, small_gan, train
from support import read_lines
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer

from launcher import (
    Objective,
    Plan,
    PlanError,
    Recipe,
    RecipeError,
    TrainingError,
    adamw,
    linear,
    make_plan,
)
from launcher.console.explain import explain, summarize
from launcher.engine.backends.local import LocalBackend
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.randomness import ModelRandomness
from launcher.engine.optimizers.joint import JointOptimizer
from launcher.recipe.objective import assign_parameters
from launcher.recipes import gan
from launcher.runs.checkpoints import list_checkpoints
from launcher.signals import StopRequest


def loss(outputs: Any, batch: Any) -> tuple[Any, int]:
    """Return a sum over the batch and the number of samples."""
    return outputs.sum(), len(batch[0])


def forward(model: Any, batch: Any) -> Any:
    """Return what the model says of the first element of a batch."""
    return model(batch[0])


CRITIC = Objective(name="critic", loss=loss, parameters="critic.*", lr=0.02, optimizer=adamw())
ACTOR = Objective(name="actor", loss=loss, parameters=["actor.*", "gain"], every=5)
NAMES = ("actor.0.weight", "actor.0.bias", "critic.body.weight", "gain")
TRAINED = {name: name for name in NAMES}


def test_objectives_stand_in_place_of_no_loss() -> None:
    """A recipe that is derived with loss=None and objectives has the loss of the first one."""
    without: Any = None
    assert replace(several(), loss=without).loss is several().objectives[0].loss


def changed(**changes: Any) -> Objective:
    """Return the critic with some fields changed."""
    return replace(CRITIC, **changes)


def several(*objectives: Objective, **changes: Any) -> Recipe:
    """Return the example with objectives in place of a loss."""
    fields = {name: getattr(recipe(), name) for name in ("name", "model", "data", "batch_size")}
    rest = {"lr": 0.1, "lr_batch_size": 64, "epochs": 10, "train_samples": 1437, "device": "cpu"}
    return Recipe(**fields | rest | {"objectives": objectives or (CRITIC, ACTOR)} | changes)


def test_objectives_inherit_what_they_do_not_give() -> None:
    """Optimizer, schedule, learning rate, forward and clipping are the recipe's where missing."""
    critic, actor = several(schedule=linear(), max_grad_norm=0.5, forward=forward).by_objective()
    assert (critic.lr, str(critic.optimizer)) == (0.02, "adamw()")
    assert (actor.lr, str(actor.optimizer)) == (0.1, "sgd()")
    assert {str(each.schedule) for each in (critic, actor)} == {"linear()"}
    assert {each.max_grad_norm for each in (critic, actor)} == {0.5}
    assert {each.forward for each in (critic, actor)} == {forward}
    one = recipe()
    assert one.by_objective() == (one,)


def test_evaluations_report_the_first_objective() -> None:
    """Without a loss of the recipe, loss and forward of the first objective are evaluated."""
    first = replace(CRITIC, forward=forward)
    assert several(first, replace(ACTOR, forward=forward)).forward is forward
    assert several(first, replace(ACTOR, forward=forward)).loss is loss
    derived = replace(several(CRITIC, ACTOR), lr=0.3)
    assert (derived.loss, derived.objectives[1].name) == (loss, "actor")


def test_the_plan_shows_each_objective() -> None:
    """The plan has each learning rate with its arithmetic, and survives being written and read."""
    plan = make_plan(several(), LAPTOP, nproc_per_node=2)
    critic, actor = plan.objectives
    assert (critic.lr, critic.lr_derivation) == (0.08, "0.08 = 0.02 x 256 / 64, linear")
    assert (actor.lr, actor.every, actor.parameters) == (0.4, 5, ("actor.*", "gain"))
    text = " ".join(explain(plan).split())
    assert "1. critic: critic.*, in every step, adamw()" in text
    assert "2. actor: actor.* gain, in 1 of 5 steps, sgd()" in text
    assert "critic, then actor in 1 of 5 steps" in summarize(plan)
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan
    assert plan.settings["objectives"][1] == "actor(parameters=actor.* gain, every=5)"
    assert "objectives" not in make_plan(recipe(), LAPTOP).settings


def test_parameters_are_assigned_by_patterns() -> None:
    """Each parameter belongs to the objectives whose patterns match one of its names."""
    tied = TRAINED | {"copy.weight": "critic.body.weight"}
    shared = replace(ACTOR, parameters=("actor.*", "gain", "copy.*"), shares=True)
    assert assign_parameters((CRITIC, ACTOR), TRAINED, ("teacher.weight",)) == {
        "critic": ("critic.body.weight",),
        "actor": ("actor.0.weight", "actor.0.bias", "gain"),
    }
    assigned = assign_parameters((CRITIC, shared), tied, ())
    assert assigned["actor"][-1:] == assigned["critic"] == ("critic.body.weight",)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("actr.*", "gain"), "Did you mean actor.*"),
        (("actor.*", "zzz"), "The names begin with actor.*"),
        (("actor.*", "gain", "teacher.*"), "matches teacher.weight, and none of them requires"),
        (("*",), "The objectives critic and actor both train critic.body.weight"),
        (("actor.*",), "No objective trains gain"),
        (("actor.0.weight",), "actor.0.bias and 1 more"),
    ],
)
def test_patterns_that_do_not_fit_are_refused(patterns: tuple[str, ...], message: str) -> None:
    """Each mistake in the patterns of parameters is named, with near names."""
    objectives = CRITIC, replace(ACTOR, parameters=patterns)
    with pytest.raises(RecipeError) as caught:
        assign_parameters(objectives, TRAINED, ("teacher.weight",))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: several(objectives=()), "there is no loss"),
        (lambda: several(objectives=CRITIC), "expected a list of objectives"),
        (lambda: several(objectives=(loss,)), "expected launcher.Objective(...) for each item"),
        (lambda: several(CRITIC, CRITIC), "2 objectives are called 'critic'"),
        (lambda: several(ACTOR), "no objective takes its turn in every step (actor every=5)"),
        (lambda: several(replace(CRITIC, forward=forward), ACTOR), "Give Recipe(forward=...)"),
        (
            lambda: several(replace(CRITIC, forward=forward), forward=lambda m, b: m(b)),
            "Give Recipe(loss=...)",
        ),
        (lambda: changed(name="a/b"), "Objective(name=...)"),
        (lambda: changed(every=0), "Objective(every=...)"),
        (lambda: changed(lr=-1), "Objective(lr=...)"),
        (lambda: changed(loss=len), "Objective('critic', loss=...)"),
        (lambda: changed(forward=3), "Objective('critic', forward=...)"),
        (lambda: changed(optimizer=Adam), "Objective('critic', optimizer=...)"),
        (lambda: changed(schedule="linear"), "Objective('critic', schedule=...)"),
        (lambda: changed(parameters=()), "Objective('critic', parameters=...)"),
    ],
)
def test_contradictory_objectives_are_refused(make: Any, message: str) -> None:
    """Each mistake in an objective is named with its field and what was found."""
    with pytest.raises(RecipeError) as caught:
        make()
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"strategy": "zero2"}, "a DeepSpeed engine has one optimizer"),
        ({"noise_scale": True}, "Leave noise_scale out"),
        ({"lr_batch_size": None}, "Give lr_batch_size"),
    ],
)
def test_what_knows_one_optimizer_is_refused(changes: dict[str, Any], message: str) -> None:
    """ZeRO and the noise scale are refused for recipes with several objectives."""
    with pytest.raises(PlanError) as caught:
        make_plan(several(**changes), replace(LAPTOP, has_deepspeed=True), nproc_per_node=2)
    assert message in str(caught.value)


def test_objectives_draw_different_numbers() -> None:
    """The first objective draws what a recipe with one loss draws, and each other one differs."""
    built = recipe(device="cpu")
    backend = LocalBackend(built, make_plan(built, LAPTOP, nproc_per_node=1))
    drawn = []
    for number in (0, 0, 1, 2):
        randomness = ModelRandomness(backend, number) if number else ModelRandomness(backend)
        randomness.begin_step(3)
        drawn.append(float(torch.rand(())))
    assert drawn[0] == drawn[1]
    assert len(set(drawn)) == 3


def test_states_of_a_shared_parameter_have_names_of_their_own() -> None:
    """Of a parameter of two optimizers, the second one's state is named after its objective."""
    own, shared = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))
    optimizers = {"one": AdamW([own, shared]), "two": SGD([shared], lr=1.0, momentum=0.9)}
    for optimizer in optimizers.values():
        own.grad, shared.grad = torch.ones(2), torch.ones(3)
        optimizer.step()
    joint = JointOptimizer(optimizers)
    assert set(joint.state[own]) == {"step", "exp_avg", "exp_avg_sq"}
    assert set(joint.state[shared]) == {"step", "exp_avg", "exp_avg_sq", "momentum_buffer@two"}
    assert [len(group["params"]) for group in joint.param_groups] == [2, 1]
    joint.state[shared] = {"step": torch.tensor(7.0), "momentum_buffer@two": torch.zeros(3)}
    assert float(optimizers["one"].state[shared]["step"]) == 7
    assert optimizers["two"].state[shared]["momentum_buffer"].sum() == 0


def plain_gan(built: Recipe, intervals: Sequence[int]) -> tuple[list[list[float]], nn.Module]:
    """Train the small GAN in a plain loop; return the losses of each step, and the model."""
    torch.manual_seed(0)
    model = built.model()
    samples = built.data().train
    functions: Any = ((gan.compare, gan.tell_apart), (gan.judge_generated, gan.deceive))
    parts = model["discriminator"], model["generator"]
    optimizers = [
        SGD(part.parameters(), lr=lr, momentum=0.9)
        for part, lr in zip(parts, (0.05, 0.2), strict=True)
    ]
    losses: list[list[float]] = []
    for step in range(10):
        epoch, position = divmod(step, 3)
        order = torch.from_numpy(Permutation(96, 0, epoch)(np.arange(96)))
        batch = samples[order[32 * position : 32 * position + 32]]
        losses.append([])
        for (call, measure), part, optimizer, interval in zip(
            functions, parts, optimizers, intervals, strict=True
        ):
            if step % interval:
                continue
            total, count = measure(call(model, batch), batch)
            model.zero_grad()
            (total / count).backward()
            nn.utils.clip_grad_norm_(part.parameters(), 0.7)
            optimizer.step()
            losses[-1].append(float(total.detach()) / count)
    return losses, model


@pytest.mark.parametrize("intervals", [(1, 1), (1, 3), (2, 1)])
@pytest.mark.parametrize("micro_batch_size", [None, 5])
def test_turns_are_those_of_a_plain_loop(
    tmp_path: Path, intervals: tuple[int, int], micro_batch_size: int | None
) -> None:
    """Losses and weights equal those of a plain loop that alternates between two optimizers."""
    built = small_gan(micro_batch_size=micro_batch_size)
    built = replace(built, objectives=every(built, *intervals))
    run_dir = train(tmp_path, built)
    rows = [row for row in read_lines(run_dir.metrics) if "loss" in row]
    names = [f"train/{objective.name}/loss" for objective in built.objectives]
    losses, model = plain_gan(built, intervals)
    found = [[row[name] for name in names if name in row] for row in rows]
    assert found == [pytest.approx(of_step, rel=1e-5) for of_step in losses]
    main = names[intervals.index(1)]
    assert [row["loss"] for row in rows] == [row[main] for row in rows]
    weights = load_file(run_dir.model)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(weights[name], weight, rtol=1e-5, atol=1e-6)


def test_one_objective_is_one_loss(tmp_path: Path) -> None:
    """A list of one objective takes the steps of the recipe with its loss, to the bit."""
    built = small_gan()
    only = replace(built.objectives[0], parameters="*", loss=gan.tell_apart)
    listed = train(tmp_path, replace(built, objectives=(only,)))
    alone = train(tmp_path, replace(built, objectives=(), loss=gan.tell_apart))
    first, second = (load_file(run_dir.model) for run_dir in (listed, alone))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_step_that_is_not_finite_names_its_objective(tmp_path: Path) -> None:
    """A loss that is not finite skips its objective's update alone, and the run ends with it."""

    def overflow(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        return outputs.sum() * float("inf"), len(batch[1])

    built = small_gan(max_bad_steps=2)
    critic, generator = built.objectives
    broken = replace(built, objectives=(critic, replace(generator, loss=overflow)))
    with pytest.raises(TrainingError, match="loss of the objective generator is"):
        train(tmp_path, broken)


def test_a_wrong_count_names_its_objective(tmp_path: Path) -> None:
    """A loss that counts something other than the samples is refused with its objective."""
    built = small_gan()
    critic, generator = built.objectives
    counted = replace(generator, loss=lambda outputs, _: (outputs.sum(), 7))
    with pytest.raises(TrainingError, match="the loss of the objective generator counted 7"):
        train(tmp_path, replace(built, objectives=(critic, counted)))


def test_a_loss_of_other_parameters_names_its_objective(tmp_path: Path) -> None:
    """A loss that does not depend on its objective's parameters is refused by name."""
    built = small_gan()
    critic, generator = built.objectives

    def made(model: nn.ModuleDict, batch: Any) -> Tensor:
        return gan.generate(model, batch[1], batch[2])

    odd = replace(critic, forward=made, loss=lambda outputs, batch: (outputs.sum(), len(batch[1])))
    with pytest.raises(RecipeError, match="The loss of the objective discriminator returned"):
        train(tmp_path, replace(built, objectives=(odd, generator)))


def test_a_mean_names_its_objective(tmp_path: Path) -> None:
    """The check before the first step finds an objective whose loss is a mean."""
    built = small_gan()
    critic, generator = built.objectives
    mean = replace(generator, loss=lambda outputs, batch: (outputs.mean(), len(batch[1])))
    with pytest.raises(RecipeError, match="The loss of the objective generator returned a mean"):
        train(tmp_path, replace(built, objectives=(critic, mean)))


def test_an_optimizer_of_other_parameters_is_refused(tmp_path: Path) -> None:
    """An optimizer function that takes all parameters of the model is refused by name."""

    def greedy(model: nn.Module, lr: float) -> Optimizer:
        return SGD(model.parameters(), lr=lr)

    built = small_gan()
    critic, generator = built.objectives
    with pytest.raises(RecipeError) as caught:
        train(tmp_path, replace(built, objectives=(replace(critic, optimizer=greedy), generator)))
    assert "The optimizer of the objective discriminator updates generator.0.weight" in str(
        caught.value
    )


def test_checkpoints_hold_every_optimizer(tmp_path: Path) -> None:
    """A checkpoint holds the momentum of all objectives, under the names of their parameters."""
    run_dir = train(tmp_path, small_gan(checkpoint_every=5), stop=StopRequest())
    (newest, *_) = list_checkpoints(run_dir)
    stored: set[str] = set()
    for shard in newest.path.glob("*.safetensors"):
        stored |= set(load_file(shard))
    for name in small_gan().model().state_dict():
        assert f"optimizer/{name}/momentum_buffer" in stored


def test_batch_norm_over_one_value_is_refused_in_any_turn(tmp_path: Path) -> None:
    """BatchNorm that gets one value per channel is refused in the turn of a later objective too."""

    def build() -> nn.ModuleDict:
        normed = nn.Sequential(nn.Linear(64, 4), nn.BatchNorm1d(4))
        return nn.ModuleDict({"plain": nn.Linear(64, 1), "normed": normed})

    def use(name: str) -> Objective:
        def call(model: Any, batch: Any) -> Tensor:
            outputs: Tensor = model[name](batch[0].flatten(1))
            return outputs

        return Objective(name=name, parameters=f"{name}.*", loss=loss, forward=call)

    objectives = use("plain"), use("normed")
    built = small_gan(model=build, batch_size=1, metrics={}, objectives=objectives)
    with pytest.raises(RecipeError, match=r"normed\.1"):
        train(tmp_path, built)
