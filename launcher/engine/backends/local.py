"""Training in one process without a process group: `python recipes/x.py`, tests, one GPU."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher.engine.backends.base import Backend
from launcher.engine.backends.compute_timer import compute_timer
from launcher.engine.backends.devices import planned_device
from launcher.engine.ranks.cpu_binding import allowed_cpus, keep_to_cpus
from launcher.engine.state.initial_values import InitialValues
from launcher.environment.world import World
from launcher.planning.plan import Plan
from launcher.planning.virtual_ranks import Part
from launcher.recipe.recipe import Recipe


class LocalBackend(Backend):
    """A backend that trains in this process alone, on the first GPU or the CPU."""

    rank = 0
    world_size = 1

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        super().__init__(recipe, plan, planned_device(recipe, plan, local_rank=0))
        self.compute_timer = compute_timer(self.device)
        self._cpus = allowed_cpus()
        self.bind_to_numa_node(World())

    def prepare(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        make_optimizer: Callable[[nn.Module], Optimizer],
        initial: InitialValues | None = None,
    ) -> tuple[nn.Module, Optimizer]:
        model = self.prepare_objective(self.place(model, initial))
        return model, make_optimizer(model)

    def communication(self) -> tuple[float, int]:
        return 0.0, 0

    def micro_step(
        self, *, last: bool, part: Part | None = None
    ) -> contextlib.AbstractContextManager[Any]:
        if self.compute_timer is not None:
            self.compute_timer.begin(last=last)
        return contextlib.nullcontext()

    def sum(self, values: Tensor) -> Tensor:
        return values

    def broadcast(self, value: Any) -> Any:
        return value

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def close(self) -> None:
        torch.get_device_module(self.device).synchronize(self.device)
        if self.cpu_binding is not None and self.cpu_binding.cpus:
            keep_to_cpus(self._cpus)  # a notebook goes on in this process
