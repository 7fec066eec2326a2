"""What loss and forward log in one process: what counts, what does not, and what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_runs import INPUTS, recipe, train
from support import read_lines
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from launcher import CallbackContext, Data, RecipeError, TrainingError, log
from launcher.engine.backends.local import LocalBackend
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.metrics.logged_numbers import LoggedNumbers
from launcher.environment.machine import read_machine
from launcher.planning.planner import make_plan
from launcher.runs.rundir import RunDir


def rows_of(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the rows of steps in metrics.jsonl."""
    return [row for row in read_lines(run_dir.metrics) if "loss" in row]


def logged_by(run_dir: RunDir) -> list[dict[str, float]]:
    """Return what each step has logged."""
    return [
        {name.removeprefix("train/"): row[name] for name in row if name.startswith("train/")}
        for row in rows_of(run_dir)
    ]


class Block(nn.Module):
    """A block that logs how often it is called, and a weight that each step changes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, inputs: Tensor) -> Tensor:
        log("calls", 1.0, 1 / 16)
        log("scale", self.scale, 1)
        outputs: Tensor = self.scale * self.linear(inputs).relu()
        return outputs


def build_blocks() -> nn.Module:
    """Return two blocks and a layer."""
    return nn.Sequential(Block(), Block(), nn.Linear(4, 1))


@pytest.mark.parametrize("recomputes", [False, True])
def test_each_call_in_training_counts_once(tmp_path: Path, recomputes: bool) -> None:
    """Neither evaluations, nor the trial, nor activations that are computed again are counted."""
    scales: list[float] = []

    class Watching:
        def before_step(self, context: CallbackContext) -> None:
            blocks = list(context.model)[:2]
            scales.append(sum(float(block.scale.detach()) for block in blocks) / 2)

    def loss(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        log("outputs", outputs.sum().bfloat16(), len(batch[0]))
        if outputs.requires_grad and len(batch[0]) == 8:
            log("eight", 2, 1)
        return outputs.square().sum(), len(batch[0])

    trained = recipe(
        Watching(),
        model=build_blocks,
        loss=loss,
        activation_checkpointing=recomputes,
        micro_batch_size=8,
        lr=0.1,
    )
    logged = logged_by(train(tmp_path / "run", trained))
    assert len(logged) == 6
    for step, numbers in enumerate(logged):
        is_last_of_epoch = step % 3 == 2  # 8 of 40 samples; the others have 2 micro-batches of 8
        assert numbers["calls"] == 16, "sum of calls / (calls / 16)"
        assert numbers["scale"] == pytest.approx(scales[step], rel=1e-6), is_last_of_epoch
        assert numbers["eight"] == 2
    assert scales[0] == 1.0
    assert scales[-1] != 1.0, "a number is that of its own step, also if it is read later"


def test_a_name_has_a_value_where_it_is_logged(tmp_path: Path) -> None:
    """Steps in which a name is not logged, or counts nothing, leave it out."""
    calls = 0

    def loss(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        nonlocal calls
        if outputs.requires_grad:
            calls += 1
            log("empty", torch.tensor(0.0), torch.tensor(0))
            log("not a number", float("nan"), 1)
            if calls in (3, 5):
                log("late", 10 * calls, 2)
        return outputs.square().sum(), len(batch[0])

    logged = logged_by(train(tmp_path / "run", recipe(loss=loss)))
    nothing = {"not a number": None}
    late = [{"late": 15.0}, {}, {"late": 25.0}]
    assert logged == [nothing, nothing, *(nothing | numbers for numbers in late), nothing]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("loss", 1, 1), "records a number called 'loss'"),
        (("two\nlines", 1, 1), "on one line"),
        (("", 1, 1), "on one line"),
        ((3, 1, 1), "found 3"),
        ((["x"], 1, 1), "found a list"),
        (("x", torch.zeros(2), 1), r"float32 \(2,\)"),
        (("x", 1, None), "found NoneType"),
        (("x", "1", 1), "found str"),
        (("x", torch.zeros((), dtype=torch.complex64), 1), "complex64"),
    ],
)
def test_what_is_no_number_is_refused(tmp_path: Path, arguments: Any, message: str) -> None:
    """A name or value that cannot be recorded ends the run in its first step."""

    def loss(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        log(*arguments)
        return outputs.square().sum(), len(batch[0])

    with pytest.raises(RecipeError, match=message):
        train(tmp_path / "run", recipe(loss=loss))


def test_names_with_numbers_in_them_are_refused(tmp_path: Path) -> None:
    """A run logs at most 256 names."""

    def loss(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        for number in range(300):
            log(f"x{number}", 1, 1)
        return outputs.square().sum(), len(batch[0])

    with pytest.raises(RecipeError, match="'x256'"):
        train(tmp_path / "run", recipe(loss=loss))


def test_a_callback_does_not_log(tmp_path: Path) -> None:
    """A call in a callback belongs to no micro-batch, and is refused."""

    class Logging:
        def after_step(self, context: CallbackContext) -> None:
            log("x", 1, 1)

    with pytest.raises(TrainingError, match=r"called in a callback[^\0]*callback Logging"):
        train(tmp_path / "run", recipe(Logging()))


def test_compiled_code_logs() -> None:
    """A call inside compiled code counts once, with the value of this call."""

    def double(inputs: Tensor) -> Tensor:
        outputs = 2 * inputs
        log("outputs", outputs.sum(), len(outputs))
        return outputs + 1

    trained = recipe()
    compiled = torch.compile(double, backend="eager")
    backend = LocalBackend(trained, make_plan(trained, read_machine(), nproc_per_node=1))
    numbers = LoggedNumbers(backend)
    request = MicroBatchRequest("train", 0, [0], has_weight=True)
    steps = []
    for value in (1.0, 2.0, 3.0):
        with numbers.of(request):
            compiled(torch.full((4,), value))
        compiled(torch.full((4,), 7.0))
        steps.append(numbers.take())
    means = numbers.means(steps, [], any_new=numbers.has_new)
    assert means == [{"outputs": 2.0}, {"outputs": 4.0}, {"outputs": 6.0}]


def test_a_micro_batch_of_weight_0_logs_nothing() -> None:
    """Micro-batches that only take part in collectives are not counted."""
    trained = recipe(data=lambda: Data(train=TensorDataset(INPUTS[:40])))
    backend = LocalBackend(trained, make_plan(trained, read_machine(), nproc_per_node=1))
    numbers = LoggedNumbers(backend)
    for has_weight in (True, False):
        request = MicroBatchRequest("train", 0, [0], has_weight=has_weight)
        with numbers.of(request):
            log("x", 5.0, 1)
    assert numbers.take() == {("x", 0): (5.0, 1.0)}
    assert numbers.take() == {}


def positive(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Count positive outputs, among the samples of this batch."""
    assert not torch.is_grad_enabled()
    return (outputs > 0).sum(), len(batch[0])


def test_a_metric_is_computed_in_training_too(tmp_path: Path) -> None:
    """`train_metrics` has the values that the loss could log, and leaves the steps as they are."""

    def loss(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
        log("own", (outputs > 0).sum(), len(batch[0]))
        return outputs.square().sum(), len(batch[0])

    options: dict[str, Any] = {"metrics": {"positive": positive}, "micro_batch_size": 8}
    plain = train(tmp_path / "plain", recipe(loss=loss, **options))
    watched = train(tmp_path / "watched", recipe(loss=loss, train_metrics=("positive",), **options))
    assert [numbers["positive"] for numbers in logged_by(watched)] == [
        numbers["own"] for numbers in logged_by(plain)
    ]
    assert watched.model.read_bytes() == plain.model.read_bytes()
    assert len({numbers["positive"] for numbers in logged_by(watched)}) > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"train_metrics": ("positve",)}, "no metric 'positve'.* Did you mean positive"),
        ({"train_metrics": ("loss",)}, "no metric 'loss'"),
        ({"train_metrics": "positive"}, "Recipe.train_metrics=.*a list"),
        ({"train_metrics": ("lr",), "metrics": {"lr": positive}}, "records a number called 'lr'"),
    ],
)
def test_a_wrong_name_in_train_metrics_is_refused(changes: Any, message: str) -> None:
    """A recipe refuses names that are not those of metrics, with the names that are near."""
    with pytest.raises(RecipeError, match=message):
        recipe(**{"metrics": {"positive": positive}} | changes)


def test_a_metric_that_returns_a_mean_in_training_is_named(tmp_path: Path) -> None:
    """The error names the metric and what it returned."""

    def mean(outputs: Tensor, batch: list[Tensor]) -> Any:
        return outputs.mean() if len(batch[0]) == 16 else (outputs.sum(), len(batch[0]))

    trained = recipe(metrics={"mean": mean}, train_metrics=("mean",))
    with pytest.raises(RecipeError, match=r"metric mean returned a tensor of shape \(\)"):
        train(tmp_path / "run", trained)
