"""The generators that library code draws from: `random`, `numpy.random` and torch's on the CPU."""

from __future__ import annotations

import random

import numpy.random
import torch

from launcher.engine.backends.base import Backend
from launcher.engine.data.seeds import derive


def seed_all(seed: int) -> None:
    """Seed all three; torch's generators on GPUs are left as they are."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for each GPU


def seed_step(seed: int, step: int, backend: Backend) -> None:
    """Seed what a model draws from in `step`, dropout masks above all, on this rank.

    By (seed, step, rank), so that a run that is resumed on as many ranks draws what it would have.
    """
    drawn = derive(seed, step, backend.rank)
    torch.default_generator.manual_seed(drawn)
    if backend.device.type == "cuda":
        torch.cuda.manual_seed(drawn)


class Generators:
    """The state of all three at some moment, so that they can be put back to it."""

    def __init__(self) -> None:
        self._python = random.getstate()
        self._numpy = numpy.random.get_state(legacy=False)
        self._torch = torch.get_rng_state()

    def are_untouched(self) -> bool:
        """Return whether nothing has drawn from any of them since."""
        now, then = numpy.random.get_state(legacy=False), self._numpy
        return (
            random.getstate() == self._python
            and torch.equal(torch.get_rng_state(), self._torch)
            and now["has_gauss"] == then["has_gauss"]
            and now["state"]["pos"] == then["state"]["pos"]
            and bool((now["state"]["key"] == then["state"]["key"]).all())
        )

    def restore(self) -> None:
        """Put all three back."""
        random.setstate(self._python)
        numpy.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
