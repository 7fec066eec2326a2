"""Tests that a checkpoint holds all state, or the run is refused after one step at the latest."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from support import ROOT, Commands, read_lines, read_weights
from torch import Tensor, nn

from launcher.engine.state.training_state import check_optimizer, empty_state
from launcher.errors import TrainingError
from launcher.runs.manifest import StateValues, sum_file

STATEFUL = f"{ROOT / 'tests/recipes/stateful.py'}:stateful"
WORLDS = f"{ROOT / 'tests/recipes/worlds.py'}:worlds"


def test_every_kind_of_state_is_resumed(run: Commands) -> None:
    """A run resumed after 4 and 5 of 6 steps is bitwise equal to an uninterrupted run."""
    for folder, steps in (("whole", 6), ("halves", 4)):
        done = run("launcher", "run", STATEFUL, "-n", "2", "-q", f"steps={steps}", "--out", folder)
        assert done.exit_code == 0, done.stderr
    for steps in (5, 6):
        done = run("launcher", "resume", "halves", "-q", f"steps={steps}")
        assert done.exit_code == 0, done.stderr
    whole, halves = read_weights(run.folder / "whole"), read_weights(run.folder / "halves")
    assert whole.keys() == halves.keys()
    assert {"scale", "seen", "near", "far", "wide", "weight"} <= whole.keys()
    for name, value in whole.items():
        assert torch.equal(value, halves[name]), name
    losses = [
        [row["loss"] for row in read_lines(run.folder / folder / "metrics.jsonl") if "loss" in row]
        for folder in ("whole", "halves")
    ]
    assert losses[0][:6] == losses[1][:6]


@pytest.mark.parametrize(
    ("settings", "exit_code", "named"),
    [
        (["optimizer=text"], 1, "'ema'"),
        (["model=unwritable", "optimizer=sgd"], 1, "get_extra_state"),
        (["model=sparse", "optimizer=sgd"], 2, "mask"),
    ],
)
def test_state_that_a_checkpoint_cannot_hold_is_refused(
    run: Commands, settings: list[str], exit_code: int, named: str
) -> None:
    """The error names the state after at most one step; exit code 2 means before the first step."""
    done = run("launcher", "run", STATEFUL, "-n", "1", "-q", "--out", "out", *settings)
    assert done.exit_code == exit_code, done.stderr
    assert named in done.stderr
    assert "Traceback" not in done.stderr
    metrics = run.folder / "out/metrics.jsonl"
    assert len(read_lines(metrics) if metrics.exists() else []) <= 1


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


def strip_optimizer(checkpoint: Path) -> None:
    """Turn a checkpoint into one of format 1 that lost its optimizer state."""
    for shard in checkpoint.glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            metadata = file.metadata()
            names = [name for name in file.keys() if not name.startswith("optimizer/")]  # noqa: SIM118
            tensors = {name: file.get_tensor(name) for name in names}
        safetensors.torch.save_file(tensors, shard, metadata)
    path = checkpoint / "checkpoint.json"
    manifest = json.loads(path.read_text())
    del manifest["digest"]
    for name, entry in manifest["files"].items():
        actual = sum_file(checkpoint / name)
        entry.update(num_bytes=actual.num_bytes, sha256=actual.sha256)
    path.write_text(json.dumps(manifest | {"format": 1}))


def test_lost_optimizer_state_of_an_earlier_version_is_detected(run: Commands) -> None:
    """A checkpoint that lost its optimizer state is refused without --accept missing-state."""
    arguments = ("-n", "2", "-q", "strategy=fsdp", "epochs=1", "num_workers=0", "--out", "out")
    done = run("launcher", "run", WORLDS, *arguments)
    assert done.exit_code == 0, done.stderr
    (checkpoint,) = (run.folder / "out/checkpoints").glob("step-*")
    strip_optimizer(checkpoint)
    done = run("launcher", "resume", "out", "epochs=2")
    assert done.exit_code == 2, done.stdout
    assert "lacks the optimizer state of" in done.stderr
    assert "--accept missing-state" in done.stderr
    done = run("launcher", "resume", "out", "epochs=2", "--accept", "missing-state")
    assert done.exit_code == 0, done.stderr
    assert "lacks the optimizer state of" in done.stdout
