"""The numbers of a plan, and the numbers that planning refuses."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from examples import LAPTOP, NODE, recipe

from launcher import Plan, PlanError, WorldError, adamw, constant, cosine, make_plan, warmup, wsd
from launcher.console.explain import explain, summarize
from launcher.environment.world import World
from launcher.planning.global_batch import micro_batch, num_micro_steps, part, shares

DOCUMENTED = (
    "nodes",
    "nproc_per_node",
    "world_size",
    "batch_size",
    "samples_per_rank",
    "samples_per_node",
    "micro_batch_size",
    "accumulation_steps",
    "lr",
    "total_steps",
    "workers_per_rank",
    "pin_memory",
)


def test_every_number_of_a_plan() -> None:
    """Two nodes of four GPUs take a batch of 256 in two micro-steps of 16 samples per GPU."""
    plan = make_plan(recipe(micro_batch_size=16), NODE, nodes=2, nproc_per_node=4)
    assert plan.world_size == 8
    assert plan.device == "cuda"
    assert plan.samples_per_rank == (32,) * 8
    assert (plan.micro_batch_size, plan.accumulation_steps) == (16, 2)
    assert plan.derivations["batch_size"] == (
        "256 = 2 nodes x 4 GPUs x 16 samples x 2 accumulation steps"
    )
    assert (plan.steps_per_epoch, plan.total_steps) == (6, 60)
    assert plan.lr == 0.1
    assert plan.lr_start == pytest.approx(0.01)
    assert plan.lr_end == pytest.approx(1e-5)
    assert plan.lr_peak_step == 27
    assert (plan.workers_per_rank, plan.pin_memory) == (4, True)


@pytest.mark.parametrize(
    ("rule", "lr", "arithmetic"),
    [
        ("linear", 0.4, "0.4 = 0.1 x 1024 / 256, linear"),
        ("sqrt", 0.2, "0.2 = 0.1 x sqrt(1024 / 256), square root"),
        ("none", 0.1, "0.1 at any batch size (lr_rule=none)"),
    ],
)
def test_the_learning_rate_follows_the_batch(rule: str, lr: float, arithmetic: str) -> None:
    """Each rule scales the reference learning rate, and the plan shows the arithmetic."""
    plan = make_plan(recipe(batch_size=1024, lr_rule=rule), LAPTOP)
    assert plan.lr == pytest.approx(lr)
    assert plan.derivations["lr"] == arithmetic


def test_a_batch_of_tokens_is_a_batch_of_samples() -> None:
    """A batch of 65,536 tokens has 32 samples of 2,048, and scales the learning rate as such."""
    tokens = recipe(batch_size=None, batch_tokens=65_536, tokens_per_sample=2048, lr_batch_size=64)
    samples = recipe(batch_size=32, lr_batch_size=64)
    plans = [make_plan(each, LAPTOP, nproc_per_node=2) for each in (tokens, samples)]
    assert [plan.batch_size for plan in plans] == [32, 32]
    assert plans[0].lr == plans[1].lr
    assert "65,536 tokens = 32 samples x 2,048" in plans[0].derivations["batch_size"]


@pytest.mark.parametrize(
    ("per_sample", "words"),
    [(None, ["tokens_per_sample"]), (48, ["960 or 1008"]), (2048, ["batch_tokens=2048"])],
)
def test_a_batch_of_tokens_needs_whole_samples(per_sample: int | None, words: list[str]) -> None:
    """Tokens that are no whole number of samples are refused with the nearest numbers."""
    tokens = recipe(batch_size=None, batch_tokens=1000, tokens_per_sample=per_sample)
    with pytest.raises(PlanError) as error:
        make_plan(tokens, LAPTOP, nproc_per_node=1)
    assert all(word in str(error.value) for word in words)


def test_a_batch_per_gpu_grows_with_the_gpus() -> None:
    """With batch_size_per_gpu the batch and the learning rate are proportional to the ranks."""
    per_gpu = recipe(batch_size=None, batch_size_per_gpu=64, lr_batch_size=64)
    one, eight = (make_plan(per_gpu, NODE, nproc_per_node=ranks) for ranks in (1, 8))
    assert (one.batch_size, eight.batch_size) == (64, 512)
    assert (one.lr, eight.lr) == pytest.approx((0.1, 0.8))
    assert any("batch_size_per_gpu=64" in note for note in eight.notes)


@pytest.mark.parametrize("size", [1, 2, 7, 29, 256])
@pytest.mark.parametrize("world_size", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 5, 64])
def test_micro_batches_cover_a_batch_once(size: int, world_size: int, limit: int) -> None:
    """Every position is in one micro-batch, none exceeds the limit, and all ranks have as many."""
    micro_steps = num_micro_steps(size, world_size, limit)
    positions: list[int] = []
    for rank in range(world_size):
        share: list[int] = []
        for step in range(micro_steps):
            micro = micro_batch(
                size, world_size=world_size, rank=rank, micro_steps=micro_steps, micro_step=step
            )
            assert len(micro) <= limit
            share += micro
        assert len(share) == shares(size, world_size)[rank]
        assert share == list(part(size, world_size, rank))
        positions += share
    assert positions == list(range(size))


def test_ten_thousand_ranks_are_planned() -> None:
    """A plan for 1,250 nodes of eight GPUs gives every rank its share."""
    plan = make_plan(recipe(batch_size=25_000, train_samples=10**9), NODE, nodes=1250)
    assert plan.world_size == 10_000
    assert sum(plan.samples_per_rank) == 25_000
    assert set(plan.samples_per_rank) == {2, 3}


@pytest.mark.parametrize(
    ("changes", "ranks", "message"),
    [
        ({"batch_size": 4, "lr_batch_size": 4}, 8, "batch_size=4 is shared by 8 ranks"),
        ({"batch_size": 2000}, 1, "1,437 training samples"),
        ({"batch_size": None, "batch_size_per_gpu": 999}, 2, "smaller batch_size_per_gpu"),
        ({"lr_batch_size": None}, 1, "Give lr_batch_size"),
        ({"train_samples": None}, 1, "Give train_samples"),
        ({}, 9, "node1 has 8"),
        ({}, 0, "-n 0"),
    ],
)
def test_contradictory_numbers_are_refused(
    changes: dict[str, Any], ranks: int, message: str
) -> None:
    """Numbers that contradict each other are refused with these numbers and a way out."""
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(**changes), NODE, nproc_per_node=ranks)
    assert message in str(caught.value)


def test_empty_training_data_is_refused() -> None:
    """Data without a sample is called empty, and no batch size is recommended for it."""
    with pytest.raises(PlanError) as caught:
        make_plan(recipe(train_samples=None), NODE, train_samples=0)
    assert "is empty" in str(caught.value)
    assert "batch_size" not in str(caught.value)


def test_missing_gpus_are_refused() -> None:
    """device=cuda on a machine without GPUs is refused, with where to look."""
    with pytest.raises(PlanError, match="CUDA_VISIBLE_DEVICES"):
        make_plan(recipe(device="cuda"), LAPTOP)


def test_another_world_is_refused() -> None:
    """A rank that finds another world than the planned one refuses it, with both numbers."""
    plan = make_plan(recipe(), NODE, nproc_per_node=4)
    plan.check_world(World(rank=3, world_size=4, local_rank=3, local_world_size=4))
    with pytest.raises(WorldError, match=r"4 ranks .* found 1"):
        plan.check_world(World())
    with pytest.raises(WorldError, match=r"found 4 \(2 nodes x 2\)"):
        plan.check_world(World(rank=3, world_size=4, local_rank=1, local_world_size=2))


@pytest.mark.parametrize(
    ("changes", "values"),
    [
        ({"lr": 0.2}, ("lr=0.1", "lr=0.2")),
        ({"trackers": ("wandb",)}, ("trackers=[]", "trackers=['wandb']")),
        ({"num_workers": 3}, ("num_workers=None", "num_workers=3")),
        ({"optimizer": lambda *_: None}, ("optimizer=sgd(", "optimizer=None")),
    ],
)
def test_another_recipe_is_refused(changes: dict[str, Any], values: tuple[str, str]) -> None:
    """A recipe with a setting that was not planned is refused, with both values."""
    plan = make_plan(recipe(), NODE)
    plan.check_recipe(recipe())
    Plan.from_dict(json.loads(json.dumps(plan.to_dict()))).check_recipe(recipe())
    with pytest.raises(WorldError) as caught:
        plan.check_recipe(recipe(**changes))
    for value in values:
        assert value in str(caught.value)


def test_differences_of_plans_are_named() -> None:
    """Two plans differ in what changes a step, and not in what belongs to a node."""
    one = make_plan(recipe(), NODE)
    assert one.differences(make_plan(recipe(), replace(NODE, usable_cores=3)).agreement()) == {}
    other = make_plan(recipe(lr=0.2), NODE).agreement()
    assert one.differences(other)["lr"] == (0.1, 0.2)


def test_a_plan_is_json_and_text() -> None:
    """The JSON of a plan has the documented names; its text fits a terminal."""
    plan = make_plan(recipe(optimizer=adamw(), batch_size=512), LAPTOP, nproc_per_node=3)
    values = json.loads(json.dumps(plan.to_dict()))
    for name in DOCUMENTED:
        assert name in values
    assert values["samples_per_rank"] == [171, 171, 170]
    text = explain(plan)
    assert max(map(len, text.splitlines())) <= 96
    assert "170 or 171 samples each" in text
    assert "lr_rule=sqrt" in text
    assert "BatchNorm" in text


@pytest.mark.parametrize(
    ("changes", "ranks", "words"),
    [
        (
            {"batch_size": 512},
            2,
            (
                "example on 2 = 1 node x 2 CPU ranks, DDP over gloo mine.py:example",
                "batch 512 = 2 ranks x 256 samples; lr 0.2 = 0.1 x 512 / 256, linear",
                "steps 30 = 10 epochs x 3 steps; one_cycle(): lr 0.02 to 2e-05, peak at step 13",
                "data 4 workers per rank, memory not pinned",
                "speed-ups none enabled: fp32 throughout",
                "set by YAML: lr=0.1; `launcher plan` shows every number",
            ),
        ),
        (
            {"batch_size": 512, "micro_batch_size": 64},
            2,
            ("batch 512 = 2 ranks x 64 samples x 4 accumulation steps; lr 0.2 = 0.1 x 512 / 256 ",),
        ),
        (
            {"micro_batch_size": 20},
            3,
            ("batch 256 on 3 ranks (85 or 86 each, 5 accumulation steps); lr 0.1",),
        ),
        (
            {"batch_milestones": (0.5,), "steps": 40, "epochs": None, "schedule": constant()},
            2,
            (
                "batch 256 on 2 ranks, then 512 from step 21 (peak lr 0.2); lr 0.1 = 0.1 x 256",
                "steps 40, as asked; constant(): lr 0.1 to 0.2",
            ),
        ),
        ({"schedule": constant()}, 2, ("constant(): lr 0.1 at every step",)),
        ({"schedule": cosine()}, 2, ("cosine(): lr 0.1 to 6.85e-05 data",)),
        ({"precision": "bf16", "compile": True}, 2, ("speed-ups precision=bf16, compile",)),
    ],
)
def test_a_run_shows_six_lines(changes: dict[str, Any], ranks: int, words: tuple[str, ...]) -> None:
    """The plan of a run is six lines of at most 96 characters, without constant notes."""
    sources = {"lr": "YAML", "batch_size": "recipe", "epochs": "default"}
    machine = replace(LAPTOP, has_compiler=True)
    plan = make_plan(recipe(**changes), machine, nproc_per_node=ranks, sources=sources)
    more = "`launcher plan` shows every number"
    lines = summarize(plan, recipe="mine.py:example", more=more).splitlines()
    assert len(lines) == 6
    assert max(map(len, lines)) <= 96
    text = " ".join(" ".join(lines).split())
    for word in words:
        assert word in text
    assert plan.notes == ()


def test_long_values_cost_details_and_no_lines() -> None:
    """A long schedule or path costs the line its details; what a user set is shown in full."""
    schedule = warmup(wsd(warmup_fraction=0.0, decay_fraction=0.25, final_factor=0.125), steps=12)
    many = {"schedule": schedule, "lr": 0.3, "seed": 11, "max_grad_norm": 0.5, "num_workers": 3}
    plan = make_plan(recipe(**many), LAPTOP, sources=dict.fromkeys(many, "command line"))
    place = f"/{'x' * 100}/mine/file.py:example"
    lines = summarize(plan, recipe=place, more="more").splitlines()
    ranks = "2 = 1 node x 2 CPU ranks, DDP over gloo"
    assert lines[0] == f"example on {ranks}  .../mine/file.py:example"
    assert lines[2].endswith(str(schedule)) or lines[2].endswith("x 6 steps")
    assert max(map(len, lines)) <= 96
    text = " ".join("".join(lines[5:]).split())
    for name in many:
        assert f"{name}=" in text
    notes = make_plan(recipe(device="cpu"), replace(LAPTOP, usable_cores=1), nproc_per_node=2)
    assert "oversubscribe 1 usable cores" in summarize(notes)
