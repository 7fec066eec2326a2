"""Muon: which matrices it updates, and how, in one process."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from small_nets import SMALL, net
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_module

from launcher import (
    RecipeError,
    ScheduleValue,
    UsageError,
    adamw,
    muon,
    schedule_free,
    sgd,
)
from launcher.engine.optimizers.exchanges import _Gathered
from launcher.engine.optimizers.matrices import WeightMatrix, rows_of_ranks
from launcher.engine.optimizers.muon import hidden_matrices, orthogonalized, rate_factor
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.hyperparameters import Hyperparameters, make_optimizer
from launcher.recipes.digits import digits


@pytest.mark.parametrize("rule", ["original", "match_rms_adamw"])
def test_muon_is_torch_s(rule: Any) -> None:
    """In the precision of torch.optim.Muon, steps of a matrix are equal to 1e-6."""
    named = muon(adjust=rule, weight_decay=0.1, others=adamw())
    configuration = replace(digits(), optimizer=named, precision="bf16")
    model, other = net(), net()
    optimizer = make_optimizer(configuration, model, 0.01)
    theirs = torch.optim.Muon([other[3].weight], lr=0.01, adjust_lr_fn=rule)
    for step in range(5):
        for net_of in (model, other):
            generator = torch.Generator().manual_seed(step)
            for weight in net_of.parameters():
                weight.grad = torch.randn(weight.shape, generator=generator)
        take_step(optimizer, configuration, finite=True)
        theirs.step()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(model[3].weight, other[3].weight, atol=1e-6, rtol=1e-6)


def test_the_other_weights_have_a_multiple_of_muon_s_learning_rate() -> None:
    """The ratio stays where the schedule changes the rates."""
    configuration = replace(digits(), optimizer=muon(others=sgd(), others_lr=2.5))
    optimizer = make_optimizer(configuration, net(), 0.04)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.04, 0.1])
    Hyperparameters(optimizer, 0.04).write(ScheduleValue(0.5))
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.05])


@pytest.mark.parametrize("named", [muon(), SMALL, schedule_free()])
def test_a_weight_that_is_frozen_at_first_is_trained_later(named: Any) -> None:
    """A weight without a gradient stays as it is, and steps with one change it."""
    configuration = replace(digits(), optimizer=named)
    model = net()
    optimizer = make_optimizer(configuration, model, 0.01)
    late = model[3].weight
    values = [late.detach().clone()]
    for is_frozen in (True, False):
        late.requires_grad_(not is_frozen)
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight) if weight.requires_grad else None
        take_step(optimizer, configuration, finite=True)
        values.append(late.detach().clone())
    assert torch.equal(values[0], values[1])
    assert not torch.equal(values[1], values[2])


@pytest.mark.parametrize("shape", [(8, 8), (5, 20), (20, 5)])
def test_matrices_are_orthogonalised(shape: tuple[int, int]) -> None:
    """Singular values are between 0.65 and 1.25, and the singular vectors stay."""
    torch.manual_seed(1)
    left, _, right = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    values = torch.linspace(0.2, 1.0, len(left.T))
    result = orthogonalized(left @ torch.diag(values) @ right, 5)
    found = left.T @ result @ right.T
    diagonal = found.diagonal()
    assert 0.65 < diagonal.min() <= diagonal.max() < 1.25
    assert (found - torch.diag(diagonal)).abs().max() < 1e-5


def test_an_update_has_the_size_of_adamw_s() -> None:
    """By match_rms_adamw, the root mean square of an orthogonal update is 0.2 of the rate."""
    for shape in ((8, 32), (32, 8), (16, 4, 2)):
        rows, columns = shape[0], math.prod(shape[1:])
        matrix = torch.zeros(rows, columns).fill_diagonal_(1.0)
        factor = rate_factor(torch.Size(shape), "match_rms_adamw")
        assert (matrix * factor).square().mean().sqrt() == pytest.approx(0.2)
    assert rate_factor(torch.Size((32, 8)), "original") == 2.0


class Tied(nn.Module):
    """A model whose head is its embedding, as transformers' models state it."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.inner = nn.Embedding(9, 6), nn.Linear(6, 6)
        self.head, self.after = nn.Linear(6, 9), nn.Linear(6, 6)
        self.head.weight = self.words.weight
        self.place = nn.Parameter(torch.zeros(1, 4, 6))

    def get_output_embeddings(self) -> nn.Module:
        """Return the head."""
        return self.head


def test_hidden_matrices() -> None:
    """Matrices and kernels are found without embeddings, the head, and names left out."""
    assert list(hidden_matrices(net())) == ["1.weight", "3.weight"]
    assert list(hidden_matrices(net(), ["1.*"])) == ["3.weight"]
    assert list(hidden_matrices(Tied())) == ["inner.weight", "after.weight"]
    frozen = net()
    frozen[3].requires_grad_(False)
    assert list(hidden_matrices(frozen)) == ["1.weight"]


def test_all_weights_are_updated_once() -> None:
    """Muon's groups and those of its other optimizer hold every trained weight once."""
    model = net()
    optimizer = make_optimizer(replace(digits(), optimizer=muon()), model, 0.1)
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    assert len(weights) == len(set(weights)) == len(list(model.parameters()))


def test_shards_take_the_steps_of_weights(mesh: DeviceMesh) -> None:
    """Steps with DTensors give the bits of the same steps with tensors."""
    for named in (SMALL, muon(others=SMALL)):
        configuration = replace(digits(), optimizer=named)
        weights = []
        for is_sharded in (False, True):
            model = distribute_module(net(), mesh) if is_sharded else net()
            optimizer = make_optimizer(configuration, model, 0.1)
            for step in range(3):
                for weight in model.parameters():
                    weight.grad = torch.ones_like(weight) * (step + 1)
                take_step(optimizer, configuration, torch.tensor(True))
            weights.append([getattr(p, "_local_tensor", p).detach() for p in model.parameters()])
        for one, other in zip(*weights, strict=True):
            assert torch.equal(one, other)


def test_matrices_in_several_shards_are_gathered(mesh: DeviceMesh) -> None:
    """A matrix that is sharded by columns is computed as a whole, and its shard returned."""
    matrix = torch.arange(12.0).view(3, 4)
    weight = DTensor.from_local(matrix, mesh, [Shard(1)])
    (result,) = _Gathered().apply(lambda whole: whole + 1, [WeightMatrix(weight)], [matrix])
    assert torch.equal(result, matrix + 1)


@pytest.mark.parametrize(("rows", "ranks"), [(10, 3), (2, 4), (8, 4), (1, 1), (5, 4)])
def test_rows_of_ranks_are_torch_chunks(rows: int, ranks: int) -> None:
    """Ranks hold the rows that torch.chunk gives them, and none after the last chunk."""
    chunks = [len(chunk) for chunk in torch.arange(rows).chunk(ranks)]
    assert rows_of_ranks(rows, ranks) == chunks + [0] * (ranks - len(chunks))


@pytest.mark.parametrize("are_emptied", [False, True])
def test_a_step_updates_what_the_groups_hold(are_emptied: bool) -> None:
    """Weights of groups that are left out, or emptied, as by DeepSpeed, stay as they are."""
    model = net()
    optimizer = make_optimizer(replace(digits(), optimizer=muon(others=sgd())), model, 0.1)
    matrices, others = (list(group["params"]) for group in optimizer.param_groups)
    before = {weight: weight.detach().clone() for weight in model.parameters()}
    for weight in before:
        weight.grad = torch.ones_like(weight)
    if are_emptied:
        optimizer.param_groups[0]["params"] = []
    else:
        optimizer.param_groups = optimizer.param_groups[:1]
    optimizer.step()
    updated = [weight for weight, values in before.items() if not torch.equal(weight, values)]
    assert set(updated) == set(others if are_emptied else matrices)


def test_models_without_matrices_are_refused() -> None:
    """Muon without a hidden matrix, and states in bfloat16 of complex weights, are refused."""
    with pytest.raises(RecipeError, match="adamw"):
        make_optimizer(replace(digits(), optimizer=muon()), nn.Linear(3, 2), 0.1)
    model = nn.Module()
    model.weight = nn.Parameter(torch.ones(3, dtype=torch.complex64))
    with pytest.raises(RecipeError, match="complex64"):
        make_optimizer(replace(digits(), optimizer=SMALL), model, 0.1)
    with pytest.raises(UsageError, match="adamw"):
        muon(others=muon())
