"""The machines of a run, and which of them this one is."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.environment.slurm_step import SlurmStep, find_step
from launcher.errors import UsageError, WorldError

DEFAULT_PORT = 29_400
"""As torchrun's."""

_HOSTS, _RENDEZVOUS, _INDEX = "LAUNCHER_HOSTS", "LAUNCHER_RENDEZVOUS", "LAUNCHER_HOST_INDEX"
"""What a launcher that was started over ssh finds in its environment."""

_PATIENCE_IN_JOBS = 120.0
"""Seconds; srun starts all tasks at once, but an image may have to be loaded on each node."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """Several machines on which one run is started, by a `launcher run` on each."""

    count: int
    host: str
    """Where they meet: a name or address of the first of them."""

    port: int
    index: int | None
    """Of this one; None where it is settled when they meet."""

    names: tuple[str, ...] = ()
    """Of all of them, where they are known."""

    join_timeout: float = 300.0
    """Seconds until all have to be there."""


def find_nodes(
    count: int | None,
    rendezvous: str | None,
    join_timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Nodes | None:
    """Return the machines of the run to start; None for this one alone.

    Args:
        count: As asked for; None goes by what Slurm has started.
        rendezvous: HOST or HOST:PORT, where the machines meet; None is for Slurm to say.
        join_timeout: Seconds until all have to be there; None is the default.
        env: The environment of this process.

    Raises:
        UsageError: More than one is asked for, and not where they meet.
        WorldError: Slurm has started something else than one launcher on each node.
    """
    env = os.environ if env is None else env
    step = find_step(env)
    if _HOSTS in env:
        nodes: Nodes | None = _of_hosts(env)
    elif rendezvous is not None:
        nodes = _met_at(rendezvous, count)
    elif step is not None and step.num_tasks > 1:
        nodes = _of_step(step, count)
    elif count is None or count == 1:
        return None
    else:
        raise UsageError(
            f"--nodes {count} needs a place to meet: start `launcher run ... --nodes {count} "
            "--rendezvous HOST` on each machine, where HOST is a name of the first of them; name "
            "them all with --hosts; or start it with srun, one task on each node."
        )
    return (
        replace(nodes, join_timeout=join_timeout or nodes.join_timeout)
        if nodes is not None
        else None
    )


def nodes_of_hosts(hosts: Sequence[str], rendezvous: str | None) -> Nodes:
    """Return the machines that one launcher reaches through ssh.

    Args:
        hosts: As ssh takes them: [USER@]HOST, or an alias.
        rendezvous: HOST[:PORT] of the first, where the others know it by another name.

    Raises:
        UsageError: One is named twice, or the first has no name that others know.
    """
    if len(set(hosts)) < len(hosts):
        raise UsageError(f"--hosts {','.join(hosts)}: each machine is named once.")
    if rendezvous is None:
        rendezvous = hosts[0].rpartition("@")[2]
        if len(hosts) > 1 and rendezvous in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(
                f"--hosts {','.join(hosts)}: the machines meet on the first, and {rendezvous} is "
                "another one on each. Name it as the others know it, there or with --rendezvous."
            )
        rendezvous = f"[{rendezvous}]" if ":" in rendezvous else rendezvous
    host, port = _place(rendezvous)
    return Nodes(count=len(hosts), host=host, port=port, index=None, names=tuple(hosts))


def nodes_environment(nodes: Nodes, index: int) -> dict[str, str]:
    """Return the variables by which `find_nodes` knows these machines, on one of them."""
    return {
        _HOSTS: ",".join(nodes.names),
        _RENDEZVOUS: f"[{nodes.host}]:{nodes.port}",
        _INDEX: str(index),
    }


def _of_hosts(env: Mapping[str, str]) -> Nodes | None:
    nodes = nodes_of_hosts(env[_HOSTS].split(","), env[_RENDEZVOUS])
    return replace(nodes, index=int(env[_INDEX])) if nodes.count > 1 else None


def _met_at(rendezvous: str, count: int | None) -> Nodes | None:
    if count is None:
        raise UsageError(
            f"--rendezvous {rendezvous} is where several machines meet: give their number as well, "
            "--nodes M."
        )
    host, port = _place(rendezvous)
    return Nodes(count=count, host=host, port=port, index=None) if count > 1 else None


def _place(rendezvous: str) -> tuple[str, int]:
    """Return host and port of HOST[:PORT]."""
    found = re.fullmatch(r"(\[[^\]]+\]|[^:]+)(?::(\d{1,5}))?", rendezvous)
    if found is None or not 0 < int(found[2] or DEFAULT_PORT) < 1 << 16:
        raise UsageError(
            f"--rendezvous {rendezvous}: expected HOST or HOST:PORT, such as node1:29400."
        )
    return found[1].strip("[]"), int(found[2] or DEFAULT_PORT)


def _of_step(step: SlurmStep, count: int | None) -> Nodes:
    nodes = len(step.tasks_per_node)
    if max(step.tasks_per_node) > 1:
        raise WorldError(
            f"srun has started launcher {step.num_tasks} times on {nodes} node"
            f"{'s' if nodes > 1 else ''}, and launcher starts the ranks of a node itself. Use "
            "`srun --ntasks-per-node=1 launcher run ... -n RANKS`; or start the recipe's file "
            f"without launcher, `srun -n {step.num_tasks} python RECIPE.py`."
        )
    if count is not None and count != nodes:
        raise WorldError(f"--nodes {count} was asked for, and the job step has {nodes}.")
    return Nodes(
        count=nodes,
        host=step.hosts[0],
        port=step.port,
        index=step.node,
        names=step.hosts,
        join_timeout=_PATIENCE_IN_JOBS,
    )
