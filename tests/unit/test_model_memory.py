"""Sizes of models, optimizers and activations that are measured on tensors without values."""

from __future__ import annotations

import resource
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, adamw, make_plan, read_machine, sgd
from launcher.engine.probes.model_memory import measure_memory
from launcher.errors import PlanError
from launcher.planning.memory_facts import MemoryFacts
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.optimizer import OptimizerSpec, muon, schedule_free
from launcher.recipes.gpt import gpt
from launcher.tuning.memory_plan import plan_memory

WIDTH = 64
LAYERS = 4


class Block(nn.Module):
    """A product and a non-linearity whose outputs backward needs."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.linear(x))


def build_model() -> nn.Module:
    """Return a chain of blocks."""
    return nn.Sequential(*(Block() for _ in range(LAYERS)))


def recipe(**settings: Any) -> Recipe:
    """Return a recipe of the chain, on vectors."""
    values: dict[str, Any] = {
        "model": build_model,
        "data": lambda: Data(train=TensorDataset(torch.zeros(8, WIDTH))),
        "optimizer": adamw(),
        "blocks": "Block",
    }
    return Recipe(
        name="chain",
        loss=lambda outputs, batch: (outputs.sum(), len(batch[0])),
        batch_size=8,
        lr=0.1,
        lr_rule="none",
        steps=1,
        device="cpu",
        **(values | settings),
    )


def measured(**settings: Any) -> MemoryFacts:
    """Return what is measured of the chain."""
    subject = recipe(**settings)
    plan = make_plan(subject, read_machine(), nproc_per_node=2)
    return measure_memory(subject, plan)


def test_sizes_of_weights_and_state() -> None:
    """AdamW has two values for each weight and a step count for each parameter."""
    reading = measured()
    weights = WIDTH * WIDTH
    assert [item.block for item in reading.model.parameters] == list(range(LAYERS))
    for item in reading.model.parameters:
        assert (item.rows, item.values, item.num_bytes) == (WIDTH, weights, 4 * weights)
        assert (item.state_bytes, item.fixed_state_bytes) == (8 * weights, 4)
    assert reading.model.sample_bytes == 4 * WIDTH
    assert reading.model.notes == ()
    assert reading.refused == {}


def test_activations_are_those_that_backward_holds() -> None:
    """At its peak a chain holds the output of each block, and two gradients of that size."""
    activations = measured().model.activations
    assert activations is not None
    row = 4 * WIDTH
    # The batch, the outputs of all blocks, and in backward the gradients of a tanh and its input.
    assert activations.bytes_per_sample == pytest.approx(row * (1 + LAYERS + 2), rel=0.2)
    checkpointed = measured().model.checkpointed
    assert checkpointed is not None
    assert activations.cast_bytes == checkpointed.cast_bytes == 0


def test_checkpointing_saves_activations() -> None:
    """A deep model keeps a third of its activations, or less, if blocks are recomputed."""
    model = measure_gpt(layers=8, width=64)
    assert model.model.activations is not None
    assert model.model.checkpointed is not None
    assert 3 * model.model.checkpointed.of(8) < model.model.activations.of(8)


def measure_gpt(*, layers: int, width: int, heads: int = 4) -> MemoryFacts:
    """Return what is measured of the recipe gpt, on a few tokens."""
    tokens = torch.zeros(8, 16, dtype=torch.int64)
    subject = replace(
        gpt(layers=layers, width=width, heads=heads),
        data=lambda: Data(train=TensorDataset(tokens, tokens)),
        device="cpu",
    )
    return measure_memory(subject, make_plan(subject, read_machine(), nproc_per_node=2))


def test_autocast_copies_weights() -> None:
    """In bf16 the weights are cast, which takes half of their bytes, and activations shrink."""
    half, full = measured(precision="bf16").model, measured().model
    assert half.activations is not None
    assert full.activations is not None
    assert half.activations.cast_bytes == 2 * LAYERS * WIDTH * WIDTH
    assert half.activations.bytes_per_sample < full.activations.bytes_per_sample


def test_a_model_larger_than_the_memory_is_measured() -> None:
    """A GPT of 26 billion weights, 100 GB, is measured without memory for its values."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    reading = measure_gpt(layers=8, width=16_384, heads=128)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert reading.model.num_values > 25_000_000_000
    assert reading.model.notes == ()
    assert grown < 300_000, "KiB"


def test_a_model_that_needs_values_is_built() -> None:
    """A model function that reads a value is built in memory, with a note, and gives the same."""

    def build() -> nn.Module:
        assert torch.ones(1).item() == 1
        return build_model()

    reading = measured(model=build)
    assert len(reading.model.notes) == 1
    assert replace(reading.model, notes=()) == measured().model


class Reading(torch.optim.SGD):
    """An optimizer that reads a value in each step."""

    def step(self, closure: Any = None) -> Any:
        float(self.param_groups[0]["params"][0].sum())
        return super().step(closure)


def test_states_of_other_optimizers() -> None:
    """Momentum is one value for each weight, also if the step reads values."""
    momentum = measured(optimizer=sgd(momentum=0.9)).model
    assert {item.state_bytes for item in momentum.parameters} == {4 * WIDTH * WIDTH}
    plain = measured(optimizer=sgd(momentum=0.0)).model
    assert {item.state_bytes for item in plain.parameters} == {0}
    reading = measured(
        optimizer=lambda model, lr: Reading(model.parameters(), lr, momentum=0.9)
    ).model
    assert {item.state_bytes for item in reading.parameters} == {4 * WIDTH * WIDTH}
    assert reading.notes == ()


def test_an_optimizer_is_refused_where_it_cannot_train() -> None:
    """Strategies under which the optimizer cannot train are named with the reason."""
    refused = measured(
        optimizer=lambda model, lr: torch.optim.Adafactor(model.parameters(), lr=lr)
    ).refused
    assert set(refused) == {"fsdp", "zero1", "zero2", "zero3"}


def test_a_model_is_refused_where_it_cannot_train() -> None:
    """Strategies that cannot train the model's parameters are named with the reason."""

    def scaled() -> nn.Module:
        model = build_model()
        model.register_parameter("scale", nn.Parameter(torch.ones(())))
        return model

    subject = recipe(model=scaled, strategy="fsdp")
    plan = make_plan(subject, read_machine(), nproc_per_node=2)
    facts = measure_memory(subject, plan)
    assert set(facts.refused) == set(STRATEGIES) - {"ddp"}
    with pytest.raises(PlanError, match="scale"):
        plan_memory(facts, subject, plan, is_here=True)


def test_without_data_activations_are_unknown() -> None:
    """A data set that cannot be read leaves the other sizes, and a note."""

    def fail() -> Data:
        raise FileNotFoundError("nowhere")

    model = measured(data=fail).model
    assert model.activations is None
    assert model.num_values == LAYERS * WIDTH * WIDTH
    assert len(model.notes) == 1


@pytest.mark.parametrize(
    ("optimizer", "state_bytes"),
    [
        (adamw(state_dtype="bf16"), [4] * LAYERS),
        (muon(), [*[4] * (LAYERS - 1), 8]),  # the head has the state of AdamW
        (schedule_free(), [8] * LAYERS),
    ],
    ids=str,
)
def test_states_of_named_optimizers(optimizer: OptimizerSpec, state_bytes: list[int]) -> None:
    """The state of each named optimizer is measured by a step, in bytes for each weight."""
    model = measured(optimizer=optimizer).model
    assert [item.state_bytes // item.values for item in model.parameters] == state_bytes
    assert model.notes == ()


def test_states_in_eight_bits() -> None:
    """The two moments of large weights take a byte each, and their scales little more."""

    def build() -> nn.Module:
        return nn.Sequential(nn.Linear(512, 1024, bias=False))

    reading = measured(
        model=build,
        data=lambda: Data(train=TensorDataset(torch.zeros(8, 512))),
        optimizer=adamw(state_dtype="int8"),
        blocks=None,
    )
    (weight,) = reading.model.parameters
    total = weight.state_bytes + weight.fixed_state_bytes
    assert 2 * weight.values < total < 2.1 * weight.values


def test_weights_in_bf16_have_gradients_in_fp32() -> None:
    """With param_dtype=bf16 a weight has two bytes, and its gradient four."""
    model = measured(param_dtype="bf16", precision="bf16").model
    for item in model.parameters:
        assert (item.num_bytes, item.gradient_bytes) == (2 * item.values, 4 * item.values)


def test_layers_that_ranks_split() -> None:
    """A colwise layer is split by rows and a rowwise one is not, and each counts by its part."""
    model = measured(
        strategy="fsdp",
        tensor_parallel=2,
        tensor_parallel_plan={"0.linear": "colwise", "1.linear": "rowwise"},
    ).model
    split = [(item.rows, item.parts) for item in model.parameters]
    assert split == [(WIDTH // 2, 2), (WIDTH, 2), (WIDTH, 1), (WIDTH, 1)]
