"""Optimizers with small states, in one process."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from examples import NODE, recipe
from small_nets import EIGHT, SMALL, net, step_with, train
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from launcher import (
    PlanError,
    RecipeError,
    adamw,
    make_plan,
    muon,
    schedule_free,
    sgd,
)
from launcher.engine.optimizers.eight_bit import code_values, dequantized, quantized
from launcher.engine.optimizers.flat import FlatOptimizer
from launcher.engine.optimizers.rounding import (
    ElementPositions,
    mix,
    random_bits,
    round_to_bfloat16,
    signed,
)
from launcher.engine.optimizers.schedule_free import ScheduleFreeAdamW
from launcher.engine.optimizers.small_adamw import SmallAdamW
from launcher.engine.optimizers.small_sgd import SmallSGD
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.recipes.digits import digits


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, which takes less time for small matrices."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def test_the_hash_is_the_published_one() -> None:
    """The hash of 32-bit numbers, signed or not, is that of Python's whole numbers."""

    def expected(number: int) -> int:
        for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
            number = (number ^ number >> shift) * factor % 2**32
        return number ^ number >> 16

    numbers = [0, 1, 12_345, 2**31 - 1, 2**31, 2**32 - 1]
    hashed = mix(torch.tensor([signed(number) for number in numbers], dtype=torch.int32))
    assert [number % 2**32 for number in hashed.tolist()] == [expected(n) for n in numbers]


@pytest.mark.parametrize("value", [1.001, -3.14159, 6e-5, 2.5e30])
def test_rounding_keeps_the_expected_value(value: float) -> None:
    """The mean of a million rounded copies is within 4 standard errors, by either half of bits."""
    number = 1 << 20
    values = torch.full((number,), value)
    bits = random_bits(torch.arange(number, dtype=torch.int32), 1, torch.tensor(5.0))
    for half in (bits & 0xFFFF, bits >> 16 & 0xFFFF):
        rounded = round_to_bfloat16(values, half)
        neighbours = torch.unique(rounded).double()
        assert len(neighbours) == 2
        error = (neighbours[1] - neighbours[0]).item() / 2 / math.sqrt(number)
        assert abs(rounded.double().mean().item() - values[0].item()) < 4 * error


def test_values_of_bfloat16_stay() -> None:
    """What bfloat16 can represent, zero included, is never changed."""
    values = torch.tensor([0.0, -0.0, 1.5, -(2.0**-120), 2.0**100])
    for bits in (0, 0xFFFF):
        assert torch.equal(
            round_to_bfloat16(values, torch.full((5,), bits, dtype=torch.int32)), values
        )


def test_positions_belong_to_elements(mesh: DeviceMesh) -> None:
    """Elements have their index in the full weight plus that of its first element, mod 2**32."""
    plain = ElementPositions(torch.empty(6, 5), 2**32 - 3)
    out = plain.of(4, 10, torch.device("cpu"))
    assert out.dtype == torch.int32
    assert out.tolist() == [(2**32 - 3 + 4 + i + 2**31) % 2**32 - 2**31 for i in range(10)]
    sharded = DTensor.from_local(torch.empty(6, 5), mesh, [Shard(1)])
    columns = ElementPositions(sharded, 7)
    columns._has_whole_rows, columns._shape, columns._offset = False, (6, 2), (0, 3)
    out = columns.of(0, 12, torch.device("cpu"))
    assert out.tolist() == [7 + 5 * row + column for row in range(6) for column in (3, 4)]


def test_float32_states_take_adamw_s_steps() -> None:
    """With states in float32, steps are those of torch.optim.AdamW to 1e-6, also if skipped."""
    weights = train(adamw(weight_decay=0.1, beta2=0.99), 9, as_tensor=False)
    model = net()
    optimizer = SmallAdamW(
        [{"params": list(model.parameters())}],
        {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1},
    )
    step_with(optimizer, model, 9)
    for weight, expected in zip(model.parameters(), weights, strict=False):
        torch.testing.assert_close(weight.detach(), expected, atol=1e-6, rtol=1e-6)


OWN = [SMALL, EIGHT, muon(), muon(others=sgd()), muon(others=SMALL), schedule_free()]


@pytest.mark.parametrize("named", OWN, ids=str)
def test_skipped_steps_change_nothing(named: Any) -> None:
    """A step whose gradient is not finite leaves weights and states, with and without a wait."""
    plain = train(named, 4)
    assert any(value.numel() > 1 for value in plain[10:])
    for as_tensor in (True, False):
        skipping = train(named, 5, finite=lambda step: step != 4, as_tensor=as_tensor)
        for one, other in zip(plain, skipping, strict=True):
            assert torch.equal(one, other)


def test_bits_do_not_depend_on_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights that are cut into many pieces get the same bits as weights updated together."""
    together = train(SMALL, 3)
    monkeypatch.setattr("launcher.engine.optimizers.flat._ON_CPU", 7)
    for one, other in zip(together, train(SMALL, 3), strict=True):
        assert torch.equal(one, other)


def test_the_seed_decides_the_bits() -> None:
    """Another seed of the run rounds otherwise; the same seed rounds alike."""
    model, results = net(), []
    for seed in (0, 0, 1):
        optimizer = make_optimizer(replace(digits(), optimizer=SMALL, seed=seed), model, 0.0001)
        for weight in model.parameters():
            weight.grad = torch.full_like(weight, 1.001)
        optimizer.step()
        results.append(
            torch.cat([optimizer.state[w]["exp_avg"].flatten() for w in model.parameters()])
        )
    assert torch.equal(results[0], results[1])
    assert not torch.equal(results[0], results[2])


def test_a_second_moment_in_bfloat16_does_not_stall() -> None:
    """After 400 steps it is right to 1 %, where rounding to the nearest is wrong by 15 %."""
    weight = nn.Parameter(torch.zeros(4096))
    optimizer = SmallAdamW(
        [{"params": [weight]}],
        {"lr": 0.0, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
        state_dtype=torch.bfloat16,
    )
    exact, nearest = 0.0, torch.zeros((), dtype=torch.bfloat16)
    for step in range(400):
        square = 1.0 if step < 50 else 0.01
        weight.grad = torch.full((4096,), math.sqrt(square))
        optimizer.step()
        exact = exact * 0.999 + square * 0.001
        nearest = (nearest.float() * 0.999 + square * 0.001).bfloat16()
    found = optimizer.state[weight]["exp_avg_sq"].double().mean().item()
    assert found == pytest.approx(exact, rel=0.01)
    assert abs(nearest.item() / exact - 1) > 0.15


def test_states_need_half_the_memory() -> None:
    """The states of a weight are two bytes each; the weight itself stays in float32."""
    model = net()
    optimizer = make_optimizer(replace(digits(), optimizer=SMALL), model, 0.1)
    assert isinstance(optimizer, FlatOptimizer)
    for weight in model.parameters():
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    for weight in model.parameters():
        assert weight.dtype == torch.float32
        state = optimizer.state[weight]
        assert {state[name].nbytes for name in ("exp_avg", "exp_avg_sq")} == {2 * weight.numel()}


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("named", [SMALL, EIGHT, muon(others=SMALL), schedule_free()], ids=str)
def test_deepspeed_is_refused(strategy: Any, named: Any) -> None:
    """A plan refuses, with the strategies that hold them, what DeepSpeed's flat pieces break."""
    with pytest.raises(PlanError, match="strategy=ddp or strategy=fsdp"):
        make_plan(recipe(strategy=strategy, optimizer=named), NODE)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd_for_small_weights_is_torch_s(nesterov: bool) -> None:
    """With weights in float32, its steps are those of torch.optim.SGD to 1e-6."""
    arguments: dict[str, Any] = {
        "lr": 0.01, "momentum": 0.9, "weight_decay": 0.1, "nesterov": nesterov
    }  # fmt: skip
    model, other = net(), net()
    step_with(SmallSGD([{"params": list(model.parameters())}], arguments), model, 5)
    step_with(torch.optim.SGD(other.parameters(), **arguments), other, 5)
    for weight, expected in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(weight, expected, atol=1e-6, rtol=1e-6)


def final_loss(**changes: Any) -> float:
    """Return the mean loss of the last 50 of 200 steps that fit a small net to another one."""
    torch.manual_seed(0)
    teacher = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model = nn.Sequential(nn.Linear(64, 96), nn.Tanh(), nn.Linear(96, 64))
    if changes.get("param_dtype") == "bf16":
        model = model.bfloat16()
    configuration = replace(digits(), precision="bf16", **changes)
    optimizer = make_optimizer(configuration, model, 0.003)
    losses: list[float] = []
    for step in range(200):
        inputs = torch.randn(64, 64, generator=torch.Generator().manual_seed(step))
        with torch.autocast("cpu", torch.bfloat16):
            outputs = model(inputs)
        loss = (outputs.float() - teacher(inputs)).square().mean()
        loss.backward()
        take_step(optimizer, configuration, finite=True)
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[0] > 3 * losses[-1]
    return sum(losses[-50:]) / 50


@pytest.mark.usefixtures("one_thread")
def test_small_states_learn_as_well() -> None:
    """After 200 steps, the loss with small states or weights is within 10 % of that in fp32."""
    expected = final_loss(optimizer=adamw())
    for changes in (
        {"optimizer": adamw(state_dtype="bf16")},
        {"optimizer": adamw(state_dtype="int8")},
        {"optimizer": adamw(state_dtype="bf16"), "param_dtype": "bf16"},
    ):
        assert final_loss(**changes) == pytest.approx(expected, rel=0.1), changes


def test_codes_of_8_bits() -> None:
    """256 values rise to 1; a block comes back to within half a step of its largest value."""
    torch.manual_seed(0)
    values = torch.randn(3, 300)
    for is_signed in (True, False):
        table = code_values(torch.device("cpu"), is_signed=is_signed)
        assert len(torch.unique(table)) == 256
        assert table[-1] == 1.0
        given = values if is_signed else values.square()
        codes, scales = quantized(given, table)
        assert (codes.dtype, codes.shape, scales.shape) == (torch.uint8, (3, 300), (3, 2))
        back = dequantized(codes, scales, table)
        largest = given.abs().amax(1, keepdim=True)
        assert ((back - given).abs() / largest).max() < 0.9 / 64
        assert torch.equal(quantized(torch.zeros(1, 5), table)[1], torch.zeros(1, 1))


def test_states_of_large_weights_are_in_8_bits() -> None:
    """Large matrices have codes and scales, small weights float32; a step is close to AdamW's."""
    final = []
    for named in (EIGHT, adamw(weight_decay=0.1)):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(300, 64), nn.Linear(64, 3))
        configuration = replace(digits(), optimizer=named)
        optimizer = make_optimizer(configuration, model, 0.01)
        step_with(optimizer, model, 5)
        final.append([weight.detach() for weight in model.parameters()])
        states = [optimizer.state[weight] for weight in model.parameters()]
        if named is EIGHT:
            assert states[0]["exp_avg"].dtype == states[0]["exp_avg_sq"].dtype == torch.uint8
            assert states[0]["exp_avg_scale"].shape == (64, 2)
            assert {state["exp_avg"].dtype for state in states[1:]} == {torch.float32}
    for small, plain in zip(*final, strict=True):
        assert (small - plain).abs().max() < 0.3 * 0.01 * 5
        assert (small - plain).norm() < 0.05 * (plain - plain.mean()).norm()


def test_rows_that_are_cut_are_refused(mesh: DeviceMesh) -> None:
    """States in 8 bits of a weight that is sharded within its rows are refused at once."""
    model = nn.Linear(128, 64, bias=False)
    model.weight = nn.Parameter(DTensor.from_local(model.weight.detach(), mesh, [Shard(1)]))
    with pytest.raises(RecipeError, match="within its rows"):
        make_optimizer(replace(digits(), optimizer=EIGHT), model, 0.1)


def test_schedule_free_is_the_article_s() -> None:
    """Steps follow the formulas of arXiv:2405.15682 for a scalar, in float64."""
    weight = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    beta1, beta2, lr, eps, decay = 0.9, 0.99, 0.05, 1e-8, 0.1
    optimizer = ScheduleFreeAdamW(
        [{"params": [weight]}],
        {"lr": lr, "beta1": beta1, "beta2": beta2, "eps": eps, "weight_decay": decay},
    )
    average = moved = point = 2.0
    square = 0.0
    for step in range(1, 8):
        gradient = 2.0 * point
        weight.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        square = beta2 * square + (1 - beta2) * gradient**2
        scaled = gradient / (math.sqrt(square / (1 - beta2**step)) + eps) + decay * point
        moved -= lr * scaled
        average += (moved - average) / step
        point = (1 - beta1) * moved + beta1 * average
        assert weight.item() == pytest.approx(point, rel=1e-9)
        optimizer.eval()
        assert weight.item() == pytest.approx(average, rel=1e-9)
        optimizer.train()


def test_an_evaluation_leaves_the_bits_of_the_weights() -> None:
    """`eval` changes the weights, and `train` puts back the same bits."""
    model = net()
    optimizer = make_optimizer(replace(digits(), optimizer=schedule_free()), model, 0.01)
    step_with(optimizer, model, 3)
    before = [weight.detach().clone() for weight in model.parameters()]
    assert isinstance(optimizer, ScheduleFreeAdamW)
    optimizer.eval()
    pairs = zip(model.parameters(), before, strict=True)
    assert not any(torch.equal(weight, old) for weight, old in pairs)
    optimizer.train()
    for weight, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(weight, old)
