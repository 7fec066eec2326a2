"""Shares of this machine: the GPUs and the cores of each run that trains at the same time."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, replace

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.planning.derivations import counted

_VARIABLES = ("CUDA_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES", "ROCR_VISIBLE_DEVICES")
"""The variables that hide GPUs; the first that is set names those that this process may use."""


@dataclass(frozen=True, kw_only=True)
class Share:
    """The part of this machine that one run of a sweep trains on."""

    gpus: tuple[str, ...]
    """Numbers or ids of the GPUs, as CUDA_VISIBLE_DEVICES names them; empty for CPU ranks."""

    cores: tuple[int, ...]
    """Numbers of the cores; empty keeps all that this process may use."""

    variable: str = _VARIABLES[0]
    """The variable that shows the GPUs to the run."""

    def of(self, machine: Machine) -> Machine:
        """Return the machine as a run in this share sees it."""
        cores = len(self.cores) or machine.usable_cores
        limit = "its share of the cores" if self.cores else machine.cores_limited_by
        return replace(machine, num_gpus=len(self.gpus), usable_cores=cores, cores_limited_by=limit)

    def take(self) -> None:
        """Restrict this process, and those that it will start, to the share."""
        if self.gpus:
            os.environ[self.variable] = ",".join(self.gpus)
        if self.cores:
            os.sched_setaffinity(0, self.cores)


def divide(
    machine: Machine,
    *,
    on_gpus: bool,
    nproc_per_node: int,
    parallel: int | None,
    env: Mapping[str, str] | None = None,
) -> tuple[Share, ...]:
    """Return a share for each run that trains at the same time.

    Args:
        machine: This machine.
        on_gpus: Whether the runs train on GPUs, of which each rank has one.
        nproc_per_node: Ranks of each run.
        parallel: Runs at a time; None is as many as there are GPUs for, or one on the CPU.
        env: The environment; None reads this process's.

    Raises:
        PlanError: The machine has too few GPUs or cores.
    """
    env = os.environ if env is None else env
    gpus, variable = _visible_gpus(machine, env) if on_gpus else ([], _VARIABLES[0])
    if parallel is None:
        parallel = max(len(gpus) // nproc_per_node, 1)
    if on_gpus and parallel * nproc_per_node > len(gpus):
        raise PlanError(
            f"{counted(parallel, 'run')} at a time, with {counted(nproc_per_node, 'GPU')} each, "
            f"were asked for, and this machine has {counted(len(gpus), 'GPU')} to use. Give a "
            "smaller --parallel or -n."
        )
    if parallel > machine.usable_cores:
        raise PlanError(
            f"--parallel {parallel}: this machine has {machine.usable_cores} usable cores "
            f"({machine.cores_limited_by}), and each run needs one. Give a smaller --parallel."
        )
    return tuple(
        Share(
            gpus=tuple(gpus[number * nproc_per_node : (number + 1) * nproc_per_node]),
            cores=_cores(machine, number, parallel),
            variable=variable,
        )
        for number in range(parallel)
    )


def _visible_gpus(machine: Machine, env: Mapping[str, str]) -> tuple[list[str], str]:
    """Return the names of the GPUs that this process may use, and the variable with them."""
    for name in _VARIABLES:
        if name in env:
            entries = [entry.strip() for entry in env[name].split(",")]
            return entries[: machine.num_gpus], name
    return list(map(str, range(machine.num_gpus))), _VARIABLES[0]


def _cores(machine: Machine, number: int, parallel: int) -> tuple[int, ...]:
    """Return the cores of one of `parallel` shares.

    Neighbouring cores go to different shares, so that each share has cores near every GPU, and with
    hyper-threading usually both threads of a core.
    """
    if parallel == 1:
        return ()
    cores = sorted(os.sched_getaffinity(0))[number::parallel]
    return tuple(cores[: max(machine.usable_cores // parallel, 1)])
