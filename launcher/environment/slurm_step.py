"""`SlurmStep`: the Slurm job step that this process is a task of, read from the environment."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import WorldError
from launcher.recipe.text_values import digits

_FIRST_SPECIAL_STEP = 0xFFFFFFF0
"""Slurm's first number for steps without srun: batch scripts, interactive shells and the like."""

_FIRST_PORT, _NUM_PORTS = 20_000, 12_000
"""The range of rendezvous ports; Linux assigns higher ports to outgoing connections."""


@dataclass(frozen=True, kw_only=True)
class SlurmStep:
    """A job step that `srun` started, and the place of this process in it."""

    job: int
    step: int
    hosts: tuple[str, ...]
    """Names of the step's nodes, in Slurm's order; the rendezvous is on the first."""

    tasks_per_node: tuple[int, ...]
    node: int
    """Index of this task's node."""

    task: int
    """Index of this task among all tasks."""

    local_task: int
    """Index of this task among the tasks on its node."""

    @property
    def num_tasks(self) -> int:
        """Return the number of tasks on all nodes."""
        return sum(self.tasks_per_node)

    @property
    def port(self) -> int:
        """Return the rendezvous port, which differs between the jobs and steps on a node."""
        return _FIRST_PORT + (self.job + 101 * self.step) % _NUM_PORTS


def find_step(env: Mapping[str, str]) -> SlurmStep | None:
    """Return the job step that the environment `env` belongs to.

    Returns:
        The step; None outside of a step that srun started, as in a batch script.

    Raises:
        WorldError: Slurm's variables are incomplete, unreadable or contradict each other.
    """
    number = env.get("SLURM_STEP_ID", "")
    step_number = digits(number)
    if step_number is None or step_number >= _FIRST_SPECIAL_STEP:
        return None
    try:
        step = SlurmStep(
            job=int(env["SLURM_JOB_ID"]),
            step=step_number,
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
        variables = {name: value for name, value in env.items() if name.startswith("SLURM_STEP")}
        raise WorldError(
            f"Slurm's variables cannot be read: {variables}. Start the ranks with srun, or unset "
            "SLURM_STEP_ID to run one process."
        ) from None
    if step.node >= len(step.tasks_per_node) or step.task >= step.num_tasks:
        raise WorldError(
            f"Slurm's variables describe task {step.task} on node {step.node} of a step with "
            f"{step.num_tasks} tasks on {len(step.tasks_per_node)} nodes, which is impossible: "
            "unset variables that are left from another job."
        )
    return step


def read_counts(text: str) -> tuple[int, ...]:
    """Return the numbers in Slurm's notation for repeated counts: `2(x3),1` is (2, 2, 2, 1).

    Raises:
        ValueError: The text has another form.
    """
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if match is None:
            raise ValueError(text)
        counts += [int(match[1])] * int(match[2] or 1)
    return tuple(counts)


def read_hosts(text: str) -> tuple[str, ...]:
    """Return the node names in Slurm's notation for lists of hosts: `gpu[003-005,9],login1`.

    Raises:
        ValueError: The text has another form.
    """
    hosts: list[str] = []
    for expression in re.split(r",(?![^\[]*\])", text):
        pieces = re.split(r"(\[[^\[\]]*\])", expression)
        choices = [_numbers(piece[1:-1]) if piece[:1] == "[" else [piece] for piece in pieces]
        hosts += map("".join, itertools.product(*choices))
    return tuple(hosts)


def _numbers(text: str) -> list[str]:
    """Return the numbers in a list of ranges, with leading zeros: `003-005,9`."""
    numbers: list[str] = []
    for part in text.split(","):
        first, _, last = part.partition("-")
        span = range(int(first), int(last or first) + 1)
        numbers += [f"{number:0{len(first)}}" for number in span]
    return numbers
