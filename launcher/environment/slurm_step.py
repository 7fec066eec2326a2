"""What Slurm tells a process about the job step that it is a task of."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import WorldError

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Steps from here on are no `srun`: the batch script, an interactive shell, external processes."""

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""Below the ports that Linux gives to outgoing connections."""


@dataclass(frozen=True, kw_only=True)
class SlurmStep:
    """A job step that `srun` has started, and which task of it this process is."""

    job: int
    step: int
    hosts: tuple[str, ...]
    """Names of its nodes, in their order; the tasks meet on the first."""

    tasks_per_node: tuple[int, ...]
    node: int
    """Index of this task's node."""

    task: int
    """Index of this task among all."""

    local_task: int
    """Index of this task among those on its node."""

    @property
    def num_tasks(self) -> int:
        return sum(self.tasks_per_node)

    @property
    def port(self) -> int:
        """The port to meet at: jobs, and steps of a job, that share a node have their own."""
        return _FIRST_PORT + (self.job + 101 * self.step) % _NUM_PORTS


def find_step(env: Mapping[str, str]) -> SlurmStep | None:
    """Return the step that `env` is of a task of; None outside of any, as in a batch script.

    Raises:
        WorldError: Slurm's variables contradict each other.
    """
    number = env.get("SLURM_STEP_ID", "")
    if not number.isdigit() or int(number) >= _FIRST_SPECIAL_STEP:
        return None
    try:
        step = SlurmStep(
            job=int(env["SLURM_JOB_ID"]),
            step=int(number),
            hosts=read_hosts(env["SLURM_STEP_NODELIST"]),
            tasks_per_node=read_counts(env["SLURM_STEP_TASKS_PER_NODE"]),
            node=int(env["SLURM_NODEID"]),
            task=int(env["SLURM_PROCID"]),
            local_task=int(env["SLURM_LOCALID"]),
        )
    except KeyError as error:
        raise WorldError(
            f"SLURM_STEP_ID={number} is set in the environment, but {error.args[0]} is not. "
            "Start the ranks with srun, or unset SLURM_STEP_ID to run one process."
        ) from None
    except ValueError:
        said = {name: value for name, value in env.items() if name.startswith("SLURM_STEP")}
        raise WorldError(f"Slurm's variables cannot be read: {said}.") from None
    if step.node >= len(step.tasks_per_node) or step.task >= step.num_tasks:
        raise WorldError(
            f"Slurm says task {step.task} on node {step.node} of a step with "
            f"{step.num_tasks} tasks on {len(step.tasks_per_node)} nodes: unset variables that are "
            "left from another job."
        )
    return step


def read_counts(text: str) -> tuple[int, ...]:
    """Return the numbers that Slurm writes as 2(x3),1.

    Raises:
        ValueError: It is not written like that.
    """
    counts: list[int] = []
    for part in text.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(text)
        counts += [int(found[1])] * int(found[2] or 1)
    return tuple(counts)


def read_hosts(text: str) -> tuple[str, ...]:
    """Return the nodes that Slurm writes as gpu[003-005,9],login1.

    Raises:
        ValueError: It is not written like that.
    """
    hosts: list[str] = []
    for expression in re.split(r",(?![^\[]*\])", text):
        pieces = re.split(r"(\[[^\[\]]*\])", expression)
        choices = [_numbers(each[1:-1]) if each[:1] == "[" else [each] for each in pieces]
        hosts += map("".join, itertools.product(*choices))
    return tuple(hosts)


def _numbers(text: str) -> list[str]:
    """Return the numbers that Slurm writes as 003-005,9, with their zeros."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        numbers += [f"{each:0{len(first)}}" for each in range(int(first), int(last or first) + 1)]
    return numbers
