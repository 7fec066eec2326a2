"""`Nodes`: the nodes of a run, one `launcher run` on each, and where they rendezvous."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from launcher.environment.slurm_step import SlurmStep, find_step
from launcher.errors import UsageError, WorldError
from launcher.recipe.text_values import digits

DEFAULT_PORT = 29_400
"""The rendezvous port, the same as torchrun's."""

_HOSTS, _RENDEZVOUS, _INDEX = "LAUNCHER_HOSTS", "LAUNCHER_RENDEZVOUS", "LAUNCHER_HOST_INDEX"
"""The environment variables of a launcher that was started over ssh."""

_KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"
"""The environment variable with the index of a pod of an Indexed Job."""

_JOIN_TIMEOUT_IN_SLURM = 120.0
"""Seconds; srun starts all tasks at once, but each node may first have to load an image."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes that one run is started on, by a `launcher run` on each."""

    count: int
    host: str
    """Name or address of the first node, where all nodes rendezvous."""

    port: int
    index: int | None
    """Index of this node; None if the rendezvous assigns it."""

    names: tuple[str, ...] = ()
    """Names of all nodes; empty if unknown."""

    join_timeout: float = 300.0
    """Seconds within which all nodes must join the rendezvous."""


def find_nodes(
    count: int | None,
    rendezvous: str | None,
    join_timeout: float | None = None,
    env: Mapping[str, str] | None = None,
) -> Nodes | None:
    """Return the nodes of the run to start; None if it runs on this node alone.

    Args:
        count: The number of nodes that --nodes asks for; None takes those of the Slurm step.
        rendezvous: HOST or HOST:PORT where the nodes rendezvous; None takes the Slurm step's.
        join_timeout: Seconds within which all nodes must join; None takes the default.
        env: The environment; None reads this process's.

    Raises:
        UsageError: Several nodes are asked for without a rendezvous, or the other way round.
        WorldError: Slurm started anything else than one launcher on each node.
    """
    env = os.environ if env is None else env
    step = find_step(env)
    if _HOSTS in env:
        nodes: Nodes | None = _nodes_over_ssh(env)
    elif rendezvous is not None:
        nodes = _nodes_at(rendezvous, count, env.get(_KUBERNETES_INDEX))
    elif step is not None and step.num_tasks > 1:
        nodes = _nodes_of_step(step, count)
    elif count is None or count == 1:
        return None
    else:
        raise UsageError(
            f"--nodes {count} needs a rendezvous: start `launcher run ... --nodes {count} "
            "--rendezvous HOST` on each node, where HOST is a name of the first node; or list all "
            "nodes with --hosts; or start the command with srun, one task on each node."
        )
    return (
        replace(nodes, join_timeout=join_timeout or nodes.join_timeout)
        if nodes is not None
        else None
    )


def is_over_ssh(env: Mapping[str, str] | None = None) -> bool:
    """Return whether another launcher has started this one over ssh."""
    return _HOSTS in (os.environ if env is None else env)


def nodes_of_hosts(hosts: Sequence[str], rendezvous: str | None) -> Nodes:
    """Return the nodes that one launcher starts over ssh.

    Args:
        hosts: The nodes as ssh takes them: [USER@]HOST, or an alias of ssh's configuration.
        rendezvous: HOST[:PORT] of the first node, if the others know it by another name.

    Raises:
        UsageError: A node is listed twice, or the others cannot reach the first by its name.
    """
    if len(set(hosts)) < len(hosts):
        raise UsageError(f"--hosts {','.join(hosts)}: a node is listed twice. List each once.")
    if rendezvous is None:
        rendezvous = hosts[0].rpartition("@")[2]
        if len(hosts) > 1 and rendezvous in ("localhost", "127.0.0.1", "::1"):
            raise UsageError(
                f"--hosts {','.join(hosts)}: the nodes rendezvous on the first, and {rendezvous} "
                "is a different machine on each node. Use a name by which the others reach the "
                "first node, in --hosts or with --rendezvous."
            )
        rendezvous = f"[{rendezvous}]" if ":" in rendezvous else rendezvous
    host, port = _read_address(rendezvous)
    return Nodes(count=len(hosts), host=host, port=port, index=None, names=tuple(hosts))


def nodes_environment(nodes: Nodes, index: int) -> dict[str, str]:
    """Return the environment variables from which `find_nodes` returns `nodes` on one of them.

    Args:
        nodes: The nodes of a run that is started over ssh.
        index: Index of the node whose environment this is.
    """
    return {
        _HOSTS: ",".join(nodes.names),
        _RENDEZVOUS: f"[{nodes.host}]:{nodes.port}",
        _INDEX: str(index),
    }


def _nodes_over_ssh(env: Mapping[str, str]) -> Nodes | None:
    nodes = nodes_of_hosts(env[_HOSTS].split(","), env[_RENDEZVOUS])
    return replace(nodes, index=int(env[_INDEX])) if nodes.count > 1 else None


def _nodes_at(rendezvous: str, count: int | None, pod: str | None) -> Nodes | None:
    """Return the nodes that meet at an address.

    Args:
        rendezvous: HOST[:PORT] of the first node.
        count: The number of nodes.
        pod: The index of this pod in Kubernetes, where the first pod need not have a name yet when
            another one starts; None elsewhere.

    Raises:
        UsageError: The number of nodes is missing, or the address is malformed.
        WorldError: The index of the pod does not fit.
    """
    if count is None:
        raise UsageError(
            f"--rendezvous {rendezvous} is for runs on several nodes: give their number as well, "
            "with --nodes M."
        )
    host, port = _read_address(rendezvous)
    if count == 1:
        return None
    index = None if pod is None else digits(pod)
    if pod is not None and (index is None or index >= count):
        raise WorldError(
            f"{_KUBERNETES_INDEX}={pod} in the environment is not the index of one of --nodes "
            f"{count}. Give the Job as many completions as nodes, or unset the variable."
        )
    return Nodes(count=count, host=host, port=port, index=index)


def _read_address(rendezvous: str) -> tuple[str, int]:
    """Return host and port of HOST[:PORT]."""
    match = re.fullmatch(r"(\[[^\]]+\]|[^:]+)(?::([0-9]{1,5}))?", rendezvous)
    host, port = (match[1].strip("[]"), int(match[2] or DEFAULT_PORT)) if match else ("", 0)
    if not 0 < port < 1 << 16 or not _can_be_a_host(host):
        raise UsageError(
            f"--rendezvous {rendezvous}: expected HOST or HOST:PORT, such as node1:29400."
        )
    return host, port


def _can_be_a_host(name: str) -> bool:
    """Return whether a name can be looked up: its parts between dots have 1 to 63 characters."""
    try:
        return bool(name.encode("idna"))
    except UnicodeError:
        return False


def _nodes_of_step(step: SlurmStep, count: int | None) -> Nodes:
    num_nodes = len(step.tasks_per_node)
    if max(step.tasks_per_node) > 1:
        raise WorldError(
            f"srun started launcher {step.num_tasks} times on {num_nodes} node"
            f"{'s' if num_nodes > 1 else ''}, but one launcher starts all ranks of a node. Use "
            "`srun --ntasks-per-node=1 launcher run ... -n RANKS`, or run the recipe's file "
            f"without launcher: `srun -n {step.num_tasks} python RECIPE.py`."
        )
    if count is not None and count != num_nodes:
        raise WorldError(
            f"--nodes {count} was asked for, and the job step has {num_nodes}. Leave --nodes out, "
            f"or start the step with srun --nodes={count}."
        )
    return Nodes(
        count=num_nodes,
        host=step.hosts[0],
        port=step.port,
        index=step.node,
        names=step.hosts,
        join_timeout=_JOIN_TIMEOUT_IN_SLURM,
    )
