"""The weights of a run as evaluations see them, as a state that any strategy can restore.

Only what an evaluation needs is offered: no state of the optimizer, and the averages of the weights
in place of the weights if the run has averaged them.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.tensor import DTensor

from launcher.engine.saving.checkpoint_tensors import StoredState
from launcher.engine.state.initial_values import shard, whole
from launcher.errors import CheckpointError, RunDirError
from launcher.runs.manifest import StateValues
from launcher.runs.weight_choice import WeightChoice
from launcher.tensor_file import read_tensor_file

_MODEL, _BUFFER, _OPTIMIZER, _AVERAGE = "model/", "buffer/", "optimizer/", "average/"


class CheckpointWeights:
    """The weights of a checkpoint: a `launcher.engine.state.training_state.StateSource`.

    Args:
        state: The content of the checkpoint.
        keeps_optimizer: Whether the optimizer's state is offered too, because the evaluated weights
            follow from it.
    """

    has_complete_state = True

    def __init__(self, state: StoredState, *, keeps_optimizer: bool) -> None:
        self._state = state
        self.name, self.world_size, self.steps = state.name, state.world_size, state.steps
        self.values: StateValues = state.values
        if not keeps_optimizer:
            self.values = {**state.values, "optimizer": {}}
        names = [name for name in state.names() if not name.startswith(_AVERAGE)]
        if not keeps_optimizer:
            names = [name for name in names if not name.startswith(_OPTIMIZER)]
        self._stored = {name: name for name in names}
        averaging = state.values.get("averaging")
        if averaging is not None and averaging["count"]:
            self._use_averages(name for name in state.names() if name.startswith(_AVERAGE))

    def _use_averages(self, averages: Iterable[str]) -> None:
        """Offer averages under the names of the weights and buffers that they replace."""
        replaced, added = set(), {}
        for name in averages:
            plain, at, label = name.removeprefix(_AVERAGE).partition("@")
            if at:
                replaced.add(f"{_BUFFER}{plain}")
                added[f"{_BUFFER}{plain}@{label}"] = name
            else:
                added[f"{_MODEL}{plain}"] = name
        kept = {
            name: stored
            for name, stored in self._stored.items()
            if name.partition("@")[0] not in replaced
        }
        self._stored = {**kept, **added}

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def size(self, name: str) -> torch.Size | None:
        stored = self._stored.get(name)
        return None if stored is None else self._state.size(stored)

    def dtype(self, name: str) -> torch.dtype:
        return self._state.dtype(self._stored[name])

    def read(self, targets: dict[str, Tensor]) -> None:
        self._state.read({self._stored[name]: tensor for name, tensor in targets.items()})


class FinalWeights:
    """The final weights of a run: a `launcher.engine.state.training_state.StateSource`.

    Args:
        choice: The run.
        parameters: The names of the model's parameters. All other tensors in the file are buffers.

    Raises:
        CheckpointError: The file cannot be read.
    """

    has_complete_state = True
    world_size = 1

    def __init__(self, choice: WeightChoice, parameters: Collection[str]) -> None:
        self._path = choice.run_dir.model
        self.name, self.steps = str(self._path), choice.step
        self.values: StateValues = {"optimizer": {}, "groups": [], "scaler": None}
        try:
            self._tensors = read_tensor_file(self._path).tensors
        except RunDirError as error:
            raise CheckpointError(str(error)) from None
        self._stored = {
            (_MODEL if name in parameters else _BUFFER) + name: name for name in self._tensors
        }

    def names(self) -> Iterable[str]:
        return self._stored.keys()

    def size(self, name: str) -> torch.Size | None:
        stored = self._stored.get(name)
        return None if stored is None else torch.Size(self._tensors[stored].shape)

    def dtype(self, name: str) -> torch.dtype:
        with self._open() as file:
            if not self.size(name):
                dtype: torch.dtype = file.get_tensor(self._stored[name]).dtype
                return dtype
            return file.get_slice(self._stored[name])[:0].dtype

    @torch.no_grad()
    def read(self, targets: dict[str, Tensor]) -> None:
        with self._open() as file:
            for name, target in targets.items():
                stored = self._stored[name]
                part = shard(target) if isinstance(target, DTensor) else whole(target)
                for box, memory in part.pieces:
                    values = (
                        file.get_slice(stored)[box.slices] if box.sizes else file.get_tensor(stored)
                    )
                    memory.copy_(values)

    def _open(self) -> Any:
        return safe_open(self._path, framework="pt")
