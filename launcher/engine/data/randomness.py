"""The global random generators: `random`, `numpy.random` and torch's CPU generator."""

from __future__ import annotations

import random
import zlib

import numpy.random
import torch

from launcher.engine.backends.base import Backend
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.data.seeds import derive
from launcher.planning.virtual_ranks import Part

_EVALUATION = 0x45
"""First element of the path of the seeds of evaluations; those of steps have other lengths."""


def seed_all(seed: int) -> None:
    """Seed the three global CPU generators; do not change torch's generators on GPUs."""
    random.seed(seed)
    numpy.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed would queue a call for each GPU


class ModelRandomness:
    """Seeds the generators that a model draws from, such as for dropout masks.

    Without virtual ranks the seed of a step depends on (seed, step, data rank), so a run that is
    resumed on the same number of data ranks draws the same numbers as an uninterrupted run. The
    ranks of a tensor-parallel group draw the same numbers: a dropout mask over an activation that
    each of them has whole is the same on all, and one over split heads or features repeats for each
    rank's part. With virtual ranks
    the seed of a micro-batch depends on (seed, step, virtual rank, micro-step), so it draws the
    same numbers on any number of ranks. The further objectives of a recipe derive theirs from
    (seed, number of the objective) in place of the seed.

    torch's generators are always seeded. Few models draw from `random` and `numpy.random`, and
    seeding those takes longer. Without virtual ranks they are seeded in the steps 0, 1, 2, 4, 8 and
    so on, counted from the creation of this object, and in all steps once the model has drawn from
    one of them. With virtual ranks they are seeded for every micro-batch, because a rank cannot
    know whether another rank has drawn.

    Args:
        backend: This rank among the others.
        objective: The number of the objective, from 0.
    """

    def __init__(self, backend: Backend, objective: int = 0) -> None:
        self._seed, self._rank = backend.plan.seed, backend.data_rank
        if objective:
            self._seed = derive(self._seed, objective)
        self._has_parts = backend.plan.virtual_ranks is not None
        self._device = backend.device
        self._num_steps = 0
        self._watches, self._draws_on_host = False, self._has_parts
        self._before: tuple[object, ...] | None = None

    def begin_step(self, step: int) -> None:
        """Begin a step, counted from 0, before its first forward pass."""
        number, self._num_steps = self._num_steps, self._num_steps + 1
        self._watches = number & (number - 1) == 0 and not self._draws_on_host
        if not self._has_parts:
            self._seed_generators(derive(self._seed, step, self._rank))

    def begin_part(self, step: int, part: Part | None) -> None:
        """Begin a micro-batch, of a virtual rank if there are any."""
        if part is not None and part.virtual_rank is not None:
            self._seed_generators(derive(self._seed, step, part.virtual_rank, part.micro_step))

    def end_step(self) -> None:
        """End a step, after its last backward pass."""
        self._watch()

    def _seed_generators(self, seed: int) -> None:
        torch.default_generator.manual_seed(seed)
        _seed_device(seed, self._device)
        if self._watches or self._draws_on_host:
            random.seed(seed)
            numpy.random.seed(seed & 0xFFFFFFFF)
        if self._watches:
            self._before = _host_fingerprint()

    def _watch(self) -> None:
        """Find out whether the model has drawn from a generator of Python or NumPy."""
        before, self._before = self._before, None
        if before is not None and before != _host_fingerprint():
            self._draws_on_host, self._watches = True, False


def _seed_device(seed: int, device: torch.device) -> None:
    """Seed torch's generator on a device other than the CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def seed_evaluation(backend: Backend, request: MicroBatchRequest) -> None:
    """Seed the generators from which a model draws in an evaluation or a prediction.

    The seed of a micro-batch depends on the run's seed, the data set and the first sample alone. An
    evaluation therefore draws the same numbers after any step, in a resumed run and in `launcher
    evaluate`, on any number of ranks on which its micro-batches are the same.

    Args:
        backend: This rank among the others.
        request: The request of the micro-batch that is evaluated next.
    """
    name = zlib.crc32(request.split.encode())
    seed = derive(backend.plan.seed, _EVALUATION, name, request.indices[0])
    seed_all(seed)
    _seed_device(seed, backend.device)


def _host_fingerprint() -> tuple[object, ...]:
    """Return a part of the states of `random` and `numpy.random` that every draw changes."""
    _, python, gauss = random.getstate()
    state = numpy.random.get_state(legacy=False)
    numpy_state = state["state"]
    position, key = numpy_state["pos"], numpy_state["key"]
    return python[0], python[-1], gauss, position, int(key[0]), state["has_gauss"]


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
