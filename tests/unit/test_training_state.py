"""Tests that a checkpoint holds all state, or the run is refused after one step at the latest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from launcher.engine.state.training_state import check_optimizer, empty_state
from launcher.errors import TrainingError
from launcher.runs.manifest import StateValues


def changed_adam(change: Callable[[torch.optim.Optimizer, nn.Module], object]) -> Any:
    """Return a model and its optimizer after a step and a call of `change`."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    change(optimizer, model)
    return model, optimizer


def test_the_state_of_torchs_optimizers_is_accepted() -> None:
    """A checkpoint can hold the complete state of torch's AdamW."""
    model, optimizer = changed_adam(lambda *_: None)
    check_optimizer(model.parameters(), optimizer)


CHANGES: dict[str, Callable[[Any, Any], object]] = {
    "state of a tensor that is not a parameter": lambda optimizer, _: optimizer.state.update(
        {torch.zeros(1): {"mean": torch.zeros(1)}}
    ),
    "a replaced parameter": lambda _, model: setattr(
        model, "weight", nn.Parameter(model.weight.detach().clone())
    ),
    "lost state": lambda optimizer, model: optimizer.state.pop(model.bias),
    "an object in the state": lambda optimizer, model: optimizer.state[model.weight].update(
        queue=object()
    ),
    "tensors in a list in the state": lambda optimizer, model: optimizer.state[model.weight].update(
        factors=[torch.zeros(1)]
    ),
    "tensors in a group": lambda optimizer, _: optimizer.param_groups[0].update(
        shadow=[torch.zeros(1)]
    ),
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_an_optimizer_with_unsaved_state_is_refused(change: Callable[[Any, Any], object]) -> None:
    """An optimizer with state that a checkpoint cannot hold raises TrainingError."""
    model, optimizer = changed_adam(change)
    with pytest.raises(TrainingError):
        check_optimizer(model.parameters(), optimizer)


class OneTensor:
    """A `StateSource` with one tensor of optimizer state, whose shape differs from its weight."""

    name, world_size, steps, has_complete_state = "test", 1, 1, True

    def __init__(self, key: str, shape: torch.Size = torch.Size([8, 1])) -> None:  # noqa: B008
        self.shape = shape
        self.values: StateValues = {"optimizer": {}, "groups": [], "scaler": None}
        self.full = f"optimizer/weight/{key}"

    def names(self) -> list[str]:
        return [self.full]

    def size(self, name: str) -> torch.Size | None:
        return self.shape if name == self.full else None

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32

    def read(self, targets: dict[str, Tensor]) -> None:
        """Leave the targets unchanged."""


@pytest.mark.parametrize(
    ("key", "group", "device"),
    [
        ("row_var", {}, "meta"),
        ("step", {}, "cpu"),
        ("step", {"fused": True}, "meta"),
        ("step", {"capturable": True}, "meta"),
    ],
)
def test_restored_state_is_on_the_device_that_torch_chooses(
    key: str, group: dict[str, Any], device: str
) -> None:
    """Restored optimizer state is on the device that torch's load_state_dict would choose."""
    weight = torch.empty(8, 4, device="meta")  # stands for a GPU
    assert empty_state(OneTensor(key), "weight", weight, group)[key].device.type == device


def test_the_step_count_of_a_scalar_stays_a_scalar() -> None:
    """A step count stays a scalar for a parameter without dimensions, also in a flat tensor."""
    source = OneTensor("step", torch.Size([]))
    for parameter in (torch.empty(()), torch.empty(10)):
        state = empty_state(source, "weight", parameter, {}, torch.Size([]))
        assert state["step"].shape == ()
