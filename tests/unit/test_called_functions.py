"""Errors from functions of a recipe: what each was called with, and what it is to return."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_runs import INPUTS, recipe, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from launcher import Data, LauncherError, PlanError, ScheduleValue, schedule
from launcher.engine.backends.nested_tensors import describe_argument
from launcher.printable import noted_text_of, traceback_of


class Named:
    """Samples that are dicts of two tensors."""

    def __init__(self, *, shortens: bool = False) -> None:
        if shortens:
            self.__getitems__ = lambda indices: [self[index] for index in indices[1:]]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"inputs": INPUTS[index], "target": INPUTS[index, 0]}


def by_name(model: nn.Module, batch: dict[str, Tensor]) -> Any:
    """Call the model with the inputs of the batch."""
    return model(batch["inputs"])


def fail(*_: Any) -> Any:
    """Raise an exception."""
    raise KeyError("of the recipe")


def without_labels(samples: list[Any]) -> Any:
    """Ask for a key that samples do not have."""
    return torch.stack([sample["label"] for sample in samples])


NAMED = r"batch: dict {'inputs': float32 \(16, 4\), 'target': float32 \(16,\)}"
LISTED = r"batch: list \[float32 \(16, 4\)\]"
DICTS = {"data": lambda: Data(train=Named()), "forward": by_name}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            DICTS | {"loss": lambda outputs, batch: (outputs - batch[1]).sum()},
            rf"1\n.*loss was called with \(outputs: Tensor float32 \(16, 1\), {NAMED}\).* \(sum, c",
        ),
        (
            DICTS | {"forward": lambda model, batch: model(batch["input"])},
            rf"forward was called with \(model: Linear, {NAMED}\).* outputs",
        ),
        ({"forward": lambda *_: None}, rf"loss was called with \(outputs: NoneType, {LISTED}\)"),
        ({"loss": lambda *_: None}, r"loss returned a NoneType; .* with .*batch: list \[float32"),
        ({"loss": lambda outputs, _: (outputs.sum(), INPUTS)}, r"a tensor of shape \(48, 4\)\);"),
        ({"loss": lambda outputs, _: (outputs.sum().detach(), 1)}, rf"gradient.*with .*{LISTED}"),
        ({"metrics": {"far": fail}, "train_metrics": ("far",)}, r"metric far was called with"),
        ({"metrics": {"far": fail}}, r"metric far was called with \(outputs: Tensor float32 \(8, "),
        ({"model": fail}, "model function was called without arguments.* torch.nn.Module"),
        ({"data": fail}, "data function was called without arguments.* launcher.Data"),
        ({"optimizer": fail}, r"optimizer function was called with \(model: Linear, lr: 0.01\)"),
        ({"count": fail}, rf"(?s)count function raised KeyError.* was called with \({LISTED}"),
        ({"count": lambda _: None}, rf"count function returned NoneType.*{LISTED}"),
        ({"count": lambda _: 3.5}, r"count function returned 3.5 \(float\)"),
        ({"count": lambda _: -1}, r"count function returned -1 \(int\)"),
        ({"count": lambda batch: batch[0]}, r"function returned Tensor float32 \(16, 4\)"),
        (
            {"data": lambda: Data(train=Named(), collate=without_labels)},
            r"(?s)collate function .*KeyError.*is {'inputs': .*called with \(samples: a list of 8 ",
        ),
        ({"data": lambda: Data(train=Named(shortens=True))}, "8 indices and returned 7 samples"),
    ],
)  # fmt: skip
def test_an_error_says_how_the_function_was_called(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    """The function is named, with the types and shapes that it was given, or what it returned."""
    settings = {"micro_batch_size": 16, "checkpoint_every": 100} | changes
    with pytest.raises((LauncherError, LookupError, TypeError, AttributeError)) as caught:
        train(tmp_path / "run", recipe(**settings))
    text = noted_text_of(caught.value)
    assert re.search(message, text), text


def test_the_call_stands_below_the_last_line_of_the_recipe(tmp_path: Path) -> None:
    """A traceback ends with the line of the recipe, the exception, and how it was called."""
    with pytest.raises(KeyError) as caught:
        train(tmp_path / "run", recipe(loss=fail))
    lines = [line for line in traceback_of(caught.value).splitlines() if line.strip(" ^")]
    *_, line, error, note = lines
    assert 'raise KeyError("of the recipe")' in line
    assert error == "KeyError: 'of the recipe'"
    assert note.startswith("launcher: The recipe's loss was called with (outputs: ")


def test_counts_of_other_types_are_whole_numbers(tmp_path: Path) -> None:
    """A count function may return a number of NumPy, or a tensor of a float without a fraction."""
    numbers = {8: np.int64(8), 16: torch.tensor(16.0)}
    trained = recipe(count=lambda batch: numbers[len(batch[0])])
    assert train(tmp_path / "run", trained).result.is_file()


def test_a_rule_that_returns_something_else_is_told_what_to_return(tmp_path: Path) -> None:
    """A schedule's rule that raises, or returns no ScheduleValue, is refused by the plan."""

    @schedule
    def early(step: int, _: int) -> ScheduleValue:
        return ScheduleValue(1.0) if step < 4 else None  # type: ignore[return-value]

    with pytest.raises(PlanError, match=r"step=\d.*total_steps=6.*launcher.ScheduleValue"):
        train(tmp_path / "run", recipe(schedule=early()))


class Recursive:
    """An object whose attributes raise."""

    @property
    def to(self) -> Any:
        raise RuntimeError("no attributes")


def test_any_argument_is_described() -> None:
    """Arrays, containers inside themselves and hostile objects have a short description."""
    endless: list[Any] = []
    endless.append(endless)
    assert describe_argument(np.zeros((2, 3), np.float32)) == "ndarray float32 (2, 3)"
    assert describe_argument({"x": [torch.zeros(2)]}) == "dict {'x': [float32 (2,)]}"
    assert describe_argument(TensorDataset(INPUTS)) == "TensorDataset"
    assert "cannot be described (RecursionError)" in describe_argument(endless)
    assert "cannot be described (RuntimeError)" in describe_argument(Recursive())
    assert len(describe_argument({"k" * 9_000: 1})) < 1_000
