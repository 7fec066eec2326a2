"""The global random generators: `random`, `numpy.random` and torch's CPU generator."""

from __future__ import annotations

import random

import numpy.random
import torch

from launcher.engine.backends.base import Backend
from launcher.engine.data.seeds import derive


def seed_all(seed: int) -> None:
    """Seed the three global CPU generators; do not change torch's generators on GPUs."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for each GPU


def seed_step(seed: int, step: int, backend: Backend) -> None:
    """Seed torch's generators for the model's computation in `step`, such as dropout masks.

    The seed depends on (seed, step, rank), so a run that is resumed on the same number of ranks
    draws the same numbers as an uninterrupted run.
    """
    step_seed = derive(seed, step, backend.rank)
    torch.default_generator.manual_seed(step_seed)
    if backend.device.type == "cuda":
        torch.cuda.manual_seed(step_seed)


class Generators:
    """A copy of the state of the three global CPU generators, taken when it is created."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = numpy.random.get_state(legacy=False)
        self._torch = torch.get_rng_state()

    def are_untouched(self) -> bool:
        """Return whether no generator has been drawn from since this copy was taken."""
        now, before = numpy.random.get_state(legacy=False), self._numpy
        return (
            random.getstate() == self._python
            and torch.equal(torch.get_rng_state(), self._torch)
            and now["has_gauss"] == before["has_gauss"]
            and now["state"]["pos"] == before["state"]["pos"]
            and bool((now["state"]["key"] == before["state"]["key"]).all())
        )

    def restore(self) -> None:
        """Reset the three generators to this copy."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
