"""Optimizers with small states and of whole matrices, in one process."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from examples import LAPTOP, NODE, recipe
from torch import Tensor, nn
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Shard, distribute_module

from launcher import (
    PlanError,
    RecipeError,
    ScheduleValue,
    UsageError,
    adamw,
    four_bits,
    make_plan,
    muon,
    schedule_free,
    sgd,
)
from launcher.engine.model.four_bits import unpacked
from launcher.engine.model.fp8 import compute_in_fp8, fp8_layers
from launcher.engine.optimizers.eight_bit import code_values, dequantized, quantized
from launcher.engine.optimizers.exchanges import _Gathered
from launcher.engine.optimizers.flat import FlatOptimizer
from launcher.engine.optimizers.matrices import WeightMatrix, rows_of_ranks
from launcher.engine.optimizers.muon import hidden_matrices, orthogonalized, rate_factor
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
from launcher.engine.state.hyperparameters import Hyperparameters, make_optimizer
from launcher.engine.state.parameter_kinds import check_parameters, keep_in_bfloat16
from launcher.recipes.digits import digits

SMALL = adamw(weight_decay=0.1, state_dtype="bf16")
EIGHT = adamw(weight_decay=0.1, state_dtype="int8")


@pytest.fixture
def mesh() -> Iterator[DeviceMesh]:
    """Yield the mesh of a process group of this process alone."""
    dist.init_process_group("gloo", store=HashStore(), rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Let torch compute with one thread, which takes less time for small matrices."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(num_threads)


def net() -> Any:
    """Return a net with an embedding, a convolution, a norm, hidden matrices and a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(9, 6), nn.Conv1d(4, 5, 3), nn.LayerNorm(4), nn.Linear(4, 7), nn.Linear(7, 3)
    )


def train(
    named: Any,
    steps: int,
    *,
    finite: Callable[[int], bool] = lambda _: True,
    as_tensor: bool = True,
) -> list[Tensor]:
    """Return weights and states after steps with gradients that depend on the step alone."""
    configuration = replace(digits(), optimizer=named)
    model = net()
    optimizer = make_optimizer(configuration, model, 0.01)
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        is_finite = finite(step)
        if not is_finite:
            next(model.parameters()).grad = torch.full((9, 6), math.nan)
            model[4].weight.grad = torch.full((3, 7), math.inf)
        take_step(optimizer, configuration, torch.tensor(is_finite) if as_tensor else is_finite)
    states = [optimizer.state[weight] for weight in model.parameters()]
    return [
        *(weight.detach() for weight in model.parameters()),
        *(value for state in states for value in state.values()),
    ]


def step_with(optimizer: Any, model: nn.Module, steps: int) -> None:
    """Take steps with the gradients of `train`."""
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        for weight in model.parameters():
            weight.grad = torch.randn(weight.shape, generator=generator)
        optimizer.step()


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


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("named", [SMALL, EIGHT, muon(others=SMALL), schedule_free()], ids=str)
def test_deepspeed_is_refused(strategy: Any, named: Any) -> None:
    """A plan refuses, with the strategies that hold them, what DeepSpeed's flat pieces break."""
    with pytest.raises(PlanError, match="strategy=ddp or strategy=fsdp"):
        make_plan(recipe(strategy=strategy, optimizer=named), NODE)


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


@pytest.mark.parametrize("named", [sgd(), adamw(), SMALL, muon(), schedule_free()], ids=str)
def test_weights_in_bfloat16_follow_those_in_float32(named: Any) -> None:
    """Small updates, which rounding to the nearest drops, add up in the mean of a weight."""
    final = []
    for dtype in ("fp32", "bf16"):
        model: Any = nn.Sequential(nn.Linear(256, 256), nn.Linear(256, 2))
        nn.init.constant_(model[0].weight, 1.0)
        if dtype == "bf16":
            model = model.bfloat16()
        configuration = replace(
            digits(), optimizer=named, precision="bf16", param_dtype=dtype, max_grad_norm=None
        )
        optimizer = make_optimizer(configuration, model, 1e-4)
        torch.manual_seed(0)
        for _ in range(20):
            for weight in model.parameters():
                weight.grad = torch.rand(weight.shape).to(weight.dtype)
            take_step(optimizer, configuration, finite=True)
        assert model[0].weight.dtype == (torch.bfloat16 if dtype == "bf16" else torch.float32)
        final.append(model[0].weight.double().mean().item() - 1.0)
    assert final[1] == pytest.approx(final[0], rel=0.1)


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


def test_layers_in_4_bits() -> None:
    """A layer keeps 4.5 bits a weight and its bias, and gives inputs the gradient of its weight."""
    torch.manual_seed(0)
    layer = nn.Linear(128, 5)
    small = four_bits(layer)
    assert small.packed.numel() * 8 / layer.weight.numel() == 4.5
    assert not any(parameter.requires_grad for parameter in small.parameters())
    weight = unpacked(small.packed, 128, torch.float32)
    assert (weight - layer.weight).norm() < 0.1 * layer.weight.norm()
    inputs = torch.randn(3, 128, requires_grad=True)
    outputs = small(inputs)
    outputs.sum().backward()
    torch.testing.assert_close(outputs, nn.functional.linear(inputs, weight, layer.bias))
    torch.testing.assert_close(inputs.grad, weight.sum(0).expand(3, 128))
    with torch.autocast("cpu", torch.bfloat16):
        assert small(inputs).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"precision": "fp32"}, "precision=bf16"),
        ({"strategy": "zero2"}, "strategy=fsdp"),
        ({"optimizer": lambda model, lr: torch.optim.SGD(model.parameters(), lr=lr)}, "adamw"),
        ({"virtual_ranks": 8, "exact": True}, "strategy=fsdp"),
    ],
)
def test_weights_in_bfloat16_are_refused(changes: dict[str, Any], advice: str) -> None:
    """A plan refuses settings that contradict weights in bf16, with what to use."""
    settings = {"precision": "bf16", "param_dtype": "bf16", **changes}
    with pytest.raises(PlanError, match=advice):
        make_plan(recipe(**settings), NODE)
    make_plan(recipe(precision="bf16", param_dtype="bf16", strategy="fsdp"), NODE)


def test_models_that_cannot_be_in_bfloat16_are_refused() -> None:
    """BatchNorm with weights in bf16, and whole numbers under DeepSpeed, are refused by name."""
    with pytest.raises(RecipeError, match="GroupNorm"):
        keep_in_bfloat16(nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)))
    plan = make_plan(recipe(strategy="zero3"), NODE)
    with pytest.raises(RecipeError, match=r"0\.packed .*uint8.* strategy=ddp or fsdp"):
        check_parameters(nn.Sequential(four_bits(nn.Linear(4, 4)), nn.Linear(4, 1)), plan)


def test_layers_that_compute_in_fp8() -> None:
    """Trained linear layers whose sizes are multiples of 16 compute in fp8, but for the last."""
    model = nn.Sequential(
        nn.Linear(32, 48), nn.Linear(48, 20), nn.Linear(20, 32), four_bits(nn.Linear(32, 32)),
        nn.Linear(32, 64), nn.Linear(64, 16),
    )  # fmt: skip
    assert fp8_layers(model) == ["0", "4"]
    model[4].requires_grad_(False)
    assert fp8_layers(model) == ["0"]
    with pytest.raises(RecipeError, match="multiples of 16"):
        compute_in_fp8(nn.Linear(16, 16))


@pytest.mark.parametrize(
    ("machine", "changes", "advice"),
    [
        (LAPTOP, {}, "Ada or Hopper"),
        (replace(NODE, has_torchao=False), {}, "pip install torchao"),
        (NODE, {"precision": "fp32"}, "precision=bf16"),
        (NODE, {"strategy": "zero3"}, "strategy=fsdp"),
    ],
)
def test_fp8_is_refused(machine: Any, changes: dict[str, Any], advice: str) -> None:
    """A plan refuses fp8 without GPUs, torchao or bf16, and under DeepSpeed."""
    with pytest.raises(PlanError, match=advice):
        make_plan(recipe(**{"precision": "bf16", "fp8": True, **changes}), machine)
    make_plan(recipe(precision="bf16", fp8=True), NODE)
