"""The check that this process is the only one that starts the ranks of its machine."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from launcher.environment.nodes import Nodes
from launcher.errors import WorldError
from launcher.recipe.text_values import digits
from launcher.signals import SECONDS_TO_BE_ENDED, StopRequest


@dataclass(frozen=True, kw_only=True)
class _Starter:
    """A program that starts one process for each rank, and the variables that it sets."""

    name: str
    mark: str
    """A variable that this program alone sets."""

    count: str
    """The number of processes on all machines."""

    local_count: str
    """The number of processes on this machine."""

    local_rank: str
    """The number of this process among those of its machine."""


_STARTERS = (
    _Starter(
        name="torchrun",  # accelerate launch sets the same
        mark="TORCHELASTIC_RUN_ID",
        count="WORLD_SIZE",
        local_count="LOCAL_WORLD_SIZE",
        local_rank="LOCAL_RANK",
    ),
    _Starter(
        name="deepspeed",
        mark="CROSS_SIZE",
        count="WORLD_SIZE",
        local_count="LOCAL_SIZE",
        local_rank="LOCAL_RANK",
    ),
    _Starter(
        name="mpirun",
        mark="OMPI_COMM_WORLD_SIZE",
        count="OMPI_COMM_WORLD_SIZE",
        local_count="OMPI_COMM_WORLD_LOCAL_SIZE",
        local_rank="OMPI_COMM_WORLD_LOCAL_RANK",
    ),
)


def check_only_launcher(nodes: Nodes | None = None, env: Mapping[str, str] | None = None) -> None:
    """Check that no other program has started this process once for each rank.

    Every process would start all ranks, so that as many runs would train at once. Only the first
    process of a machine reports the error; the others wait until they are ended.

    Args:
        nodes: The nodes that `launcher` connects; None is this machine alone.
        env: The environment; None reads this process's.

    Raises:
        WorldError: Another program has started several processes.
    """
    env = os.environ if env is None else env
    for starter in _STARTERS:
        count = digits(env.get(starter.count, "")) or 1
        local_count = digits(env.get(starter.local_count, "")) or 1
        if starter.mark not in env or (local_count if nodes is not None else count) == 1:
            continue
        if env.get(starter.local_rank, "0") != "0":
            StopRequest().wait_to_be_ended(SECONDS_TO_BE_ENDED)
        raise WorldError(
            f"{starter.name} has started this command {count} times ({starter.mark} is set in the "
            "environment), and launcher starts the ranks itself: every process would start a run "
            f"of its own. Leave {starter.name} out, or start the recipe's file with it instead of "
            f"launcher. Unset {starter.mark} if it is left from elsewhere."
        )
