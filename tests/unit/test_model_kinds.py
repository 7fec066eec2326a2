"""Models and optimizers of unusual kinds: trained as usual, or refused before the first step."""

from __future__ import annotations

import io
from collections import UserDict, deque
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, cast

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.optim import Optimizer
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, RecipeError, constant, make_plan, read_machine
from launcher.engine.backends.local import LocalBackend
from launcher.engine.backends.nested_tensors import describe_nested, map_tensors, tensors_in
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.engine.state.hyperparameters import left_out_text
from launcher.engine.state.optimizer_kinds import check_optimizer_kind, check_strategy_of
from launcher.engine.state.parameter_kinds import check_parameters
from launcher.planning.strategy import STRATEGIES
from launcher.printable import notes_of
from launcher.recipe.recipe import StrategyName
from launcher.runs.rundir import RunDir

WORDS = torch.arange(32 * 4).reshape(32, 4) % 7
TARGETS = torch.arange(32) % 3


def loss(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies."""
    return functional.cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


class Embedded(nn.Module):
    """A classifier of bags of words.

    Args:
        sparse: Whether the gradients of the embedding are sparse.
    """

    def __init__(self, *, sparse: bool) -> None:
        super().__init__()
        self.words, self.head = nn.Embedding(9, 8, sparse=sparse), nn.Linear(8, 3)

    def forward(self, words: Tensor) -> Any:
        return self.head(self.words(words).mean(1))


class Scaled(nn.Module):
    """A model with a scalar parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded, self.scale = Embedded(sparse=False), nn.Parameter(torch.ones(()))

    def forward(self, words: Tensor) -> Any:
        return self.embedded(words) * self.scale


def with_complex_numbers() -> nn.Module:
    """Return a model with a complex weight."""
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, dtype=torch.complex64))


def with_empty_weight() -> nn.Module:
    """Return a linear layer with a further weight that has no elements."""
    module = nn.Linear(4, 3)
    module.unused = nn.Parameter(torch.ones(0, 3))
    return module


def lazy() -> nn.Module:
    """Return a model whose layers learn their sizes from the first batch."""
    return nn.Sequential(
        nn.Embedding(9, 8), nn.Flatten(), nn.LazyBatchNorm1d(), nn.Dropout(0.5), nn.LazyLinear(3)
    )


def plain_sgd(model: nn.Module, lr: float) -> Optimizer:
    """Return SGD without momentum, which takes sparse and dense gradients."""
    return torch.optim.SGD(model.parameters(), lr=lr)


def recipe(**changes: Any) -> Recipe:
    """Return a recipe over bags of words with some fields changed."""
    fields: dict[str, Any] = {
        "name": "kinds",
        "model": lambda: Embedded(sparse=False),
        "data": lambda: Data(train=TensorDataset(WORDS, TARGETS)),
        "loss": loss,
        "optimizer": plain_sgd,
        "batch_size": 16,
        "micro_batch_size": 8,
        "lr": 0.5,
        "lr_batch_size": 16,
        "epochs": 4,
        "train_samples": 32,
        "schedule": constant(),
        "in_memory": True,
        "device": "cpu",
    }
    return Recipe(**fields | changes)


def train(folder: Path, recipe: Recipe) -> dict[str, Tensor]:
    """Train in this process; return the weights."""
    folder.mkdir()
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    train_rank(recipe, plan, LocalBackend(recipe, plan), RunDir(folder), output)
    return load_file(RunDir(folder).model)


@pytest.mark.parametrize("max_grad_norm", [None, 0.1])
def test_sparse_gradients_take_the_steps_of_dense_ones(
    tmp_path: Path, max_grad_norm: float | None
) -> None:
    """Weights after training with sparse and with dense gradients agree, clipped or not."""
    dense, sparse = (
        train(
            tmp_path / str(is_sparse),
            recipe(model=lambda: Embedded(sparse=is_sparse), max_grad_norm=max_grad_norm),  # noqa: B023
        )
        for is_sparse in (False, True)
    )
    for name, weight in dense.items():
        assert torch.allclose(weight, sparse[name], atol=1e-6), name


def test_lazy_layers_are_initialised_by_a_batch(tmp_path: Path) -> None:
    """Lazy layers are trained; two runs are equal, and the batch leaves no trace in BatchNorm."""
    one, other = (train(tmp_path / name, recipe(model=lazy)) for name in ("one", "other"))
    assert one["4.weight"].shape == (3, 32)
    assert one["2.num_batches_tracked"] == 4 * 2 * 2
    for name, weight in one.items():
        assert torch.equal(weight, other[name]), name


def test_a_lazy_layer_that_forward_leaves_out_is_refused(tmp_path: Path) -> None:
    """A layer whose size stays unknown is named before the first step."""

    def model() -> nn.Module:
        module = Embedded(sparse=False)
        module.unused = nn.LazyLinear(3)
        return module

    with pytest.raises(RecipeError, match=r"unused\.weight"):
        train(tmp_path / "out", recipe(model=model))


def test_a_model_that_divides_batches_itself_is_refused(tmp_path: Path) -> None:
    """DataParallel around the model is refused before the first step."""

    def model() -> nn.Module:
        return nn.DataParallel(Embedded(sparse=False))

    with pytest.raises(RecipeError, match="DataParallel"):
        train(tmp_path / "out", recipe(model=model))


@pytest.mark.parametrize("model", [Scaled(), Embedded(sparse=True), with_complex_numbers()])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters_that_cannot_be_sharded_are_refused(model: nn.Module, strategy: str) -> None:
    """Scalars, complex numbers and sparse gradients are refused by exactly those that shard."""
    chosen = recipe(strategy=cast("StrategyName", strategy))
    plan = make_plan(chosen, read_machine(), nproc_per_node=2)
    if not STRATEGIES[strategy].shards:
        check_parameters(model, plan)
        return
    with pytest.raises(RecipeError, match="strategy=ddp"):
        check_parameters(model, plan)


def test_hooks_on_gradients_are_refused_where_weights_are_split() -> None:
    """A hook on a parameter, which FSDP and ZeRO-3 replace by parts, is refused by these alone."""
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        model = nn.Linear(4, 3)
        getattr(model.weight, hook)(lambda _: None)
        for name, strategy in STRATEGIES.items():
            plan = make_plan(recipe(strategy=name), read_machine(), nproc_per_node=2)
            if strategy.shards_parameters:
                with pytest.raises(RecipeError, match=r"weight has a hook"):
                    check_parameters(model, plan)
            else:
                check_parameters(model, plan)


def test_hooks_on_accumulated_gradients_are_refused_with_micro_batches() -> None:
    """A hook that sees sums over micro-batches is refused where a step has several of them."""
    model = nn.Linear(4, 3)
    register: Any = model.weight.register_post_accumulate_grad_hook
    register(lambda _: None)
    whole = recipe(micro_batch_size=None)
    check_parameters(model, make_plan(whole, read_machine(), nproc_per_node=1))
    for several_of in (recipe(), replace(whole, virtual_ranks=2)):
        several = make_plan(several_of, read_machine(), nproc_per_node=1)
        with pytest.raises(RecipeError, match=r"weight has a hook"):
            check_parameters(model, several)


@pytest.mark.parametrize(
    ("model", "refused"),
    [
        (nn.Linear(4, 3, dtype=torch.float64), {"zero1", "zero2", "zero3"}),
        (nn.Linear(4, 3, dtype=torch.bfloat16), {"zero1", "zero2", "zero3"}),
        (nn.Linear(4, 3, dtype=torch.bfloat16).requires_grad_(False), set()),
        (with_empty_weight(), {"zero3"}),
    ],
)
def test_parameters_that_deepspeed_would_not_train_are_refused(
    model: nn.Module, refused: set[str]
) -> None:
    """Float64 and trained bf16 are refused under ZeRO, and no elements where it gathers weights."""
    for strategy in STRATEGIES:
        plan = make_plan(recipe(strategy=strategy), read_machine(), nproc_per_node=2)
        if strategy in refused:
            with pytest.raises(RecipeError, match=strategy):
                check_parameters(model, plan)
        else:
            check_parameters(model, plan)


@pytest.mark.parametrize(
    ("name", "refused"),
    [
        ("Adafactor", {"fsdp", "zero1", "zero2", "zero3"}),
        ("Muon", {"zero1", "zero2", "zero3"}),
        ("Rprop", {"fsdp"}),
        ("RMSprop", set()),
    ],
)
def test_an_optimizer_is_refused_where_it_does_not_train(name: str, refused: set[str]) -> None:
    """The advice of each refusal is a strategy that accepts the optimizer."""
    optimizer = getattr(torch.optim, name)([nn.Parameter(torch.ones(2, 2))], lr=0.1)
    for strategy in STRATEGIES:
        if strategy not in refused:
            check_strategy_of(optimizer, strategy)
            continue
        with pytest.raises(RecipeError) as caught:
            check_strategy_of(optimizer, strategy)
        advised = {other for other in STRATEGIES if other in str(caught.value)} - {strategy}
        assert advised == STRATEGIES.keys() - refused


class Scaling(Optimizer):
    """An optimizer whose step is as long as the weight, or as all gradients, as LARS and Prodigy.

    Args:
        weights: What it trains.
        by: What its steps are scaled by: weight, gradients or nothing.
    """

    def __init__(self, weights: Any, by: str) -> None:
        super().__init__(weights, {"lr": 0.1})
        self.by, self.length = by, 1.0

    @torch.no_grad()
    def step(self) -> None:  # type: ignore[override]
        for group in self.param_groups:
            trained = [weight for weight in group["params"] if weight.grad is not None]
            if self.by == "gradients":
                self.length += float(sum(weight.grad.square().sum() for weight in trained))
            for weight in trained:
                scale = weight.norm() if self.by == "weight" else self.length
                weight.sub_(group["lr"] * scale * weight.grad.sign())


@pytest.mark.parametrize("by", ["weight", "gradients", "nothing"])
def test_an_optimizer_that_looks_at_whole_weights_is_refused_under_zero(by: str) -> None:
    """Steps by norms are refused where weights are flattened; trying them changes no weight."""
    weights = [nn.Parameter(torch.ones(3, 2)), nn.Parameter(torch.ones(3))]
    optimizer = Scaling([{"params": [weight]} for weight in weights], by)
    for name, strategy in STRATEGIES.items():
        if strategy.uses_deepspeed and by != "nothing":
            with pytest.raises(RecipeError, match="ddp or fsdp"):
                check_strategy_of(optimizer, name)
        else:
            check_strategy_of(optimizer, name)
    assert optimizer.length == 1.0
    assert not optimizer.state
    assert all((weight == 1).all() for weight in weights)


class SecondOrder(torch.optim.SGD):
    """An optimizer that computes the loss itself."""

    def step(self, closure: Any) -> Any:  # type: ignore[override]
        return closure()


@pytest.mark.parametrize(
    ("optimizer", "fragment"),
    [
        (None, "NoneType"),
        ([torch.optim.SGD([nn.Parameter(torch.ones(2))])], "objectives"),
        (SecondOrder([nn.Parameter(torch.ones(2))]), "SecondOrder"),
        (torch.optim.LBFGS([nn.Parameter(torch.ones(2))]), "LBFGS"),
        (torch.optim.SGD([{"params": [nn.Parameter(torch.ones(2))], "lr": None}]), "lr=None"),
    ],
)
def test_an_optimizer_that_the_loop_cannot_use_is_refused(optimizer: Any, fragment: str) -> None:
    """No optimizer, one that needs a closure, and one without a learning rate are refused."""
    with pytest.raises(RecipeError) as caught:
        check_optimizer_kind(optimizer)
    assert fragment in str(caught.value)


def test_parameters_that_an_optimizer_leaves_out_are_named() -> None:
    """Trained parameters that no optimizer updates are counted and named; frozen ones are not."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 1))
    model[2].requires_grad_(False)
    assert left_out_text(torch.optim.SGD(model.parameters()), model) == ""
    text = left_out_text(torch.optim.SGD(model[0].parameters()), model)
    assert "2 of 4 parameters" in text
    assert "1.weight" in text


def test_a_loss_that_calls_backward_is_told_so(tmp_path: Path) -> None:
    """Torch's error about a graph that is gone is explained by who calls backward."""

    def impatient(outputs: Tensor, batch: Any) -> tuple[Tensor, int]:
        total, count = loss(outputs, batch)
        total.backward()  # type: ignore[no-untyped-call]
        return total, count

    with pytest.raises(RuntimeError) as caught:
        train(tmp_path / "out", recipe(model=lambda: Embedded(sparse=False), loss=impatient))
    assert "backward()" in notes_of(caught.value)[0]


class Pair(NamedTuple):
    """A named tuple."""

    x: Any
    y: Any


@dataclass(frozen=True)
class Fields:
    """A frozen dataclass."""

    x: Any
    name: str = "kept"


@pytest.mark.parametrize(
    "wrap",
    [
        lambda x: x,
        lambda x: [x],
        lambda x: (x, "kept"),
        lambda x: Pair(x, 1),
        lambda x: {"x": x},
        lambda x: UserDict(x=x),
        lambda x: MappingProxyType({"x": x}),
        lambda x: deque([x]),
        lambda x: Fields(x),  # noqa: PLW0108
        lambda x: {"pairs": [Pair(Fields(x), None)]},
    ],
)
def test_tensors_are_found_in_containers(wrap: Any) -> None:
    """Tensors in containers are found and replaced in a copy; a description shows their shape."""
    x = torch.ones(2, 3)
    original = wrap(x)
    doubled = map_tensors(lambda tensor: 2 * tensor, original)
    assert [tensor.sum().item() for tensor in tensors_in(original)] == [6]
    assert [tensor.sum().item() for tensor in tensors_in(doubled)] == [12]
    assert "float32 (2, 3)" in describe_nested(original)
