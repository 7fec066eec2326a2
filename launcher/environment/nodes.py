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
_COUNTS = "LAUNCHER_HOST_COUNTS"
"""The environment variables of a launcher that was started over ssh."""

_KUBERNETES_INDEX = "JOB_COMPLETION_INDEX"
"""The environment variable with the index of a pod of an Indexed Job."""

_JOIN_TIMEOUT_IN_SLURM = 120.0
"""Seconds; srun starts all tasks at once, but each node may first have to load an image."""


@dataclass(frozen=True, kw_only=True)
class NodesRequest:
    """What the options of a command say about the nodes of a run."""

    count: tuple[int, int] | None = None
    """The smallest and the largest number of nodes; None takes those of the Slurm step."""

    rendezvous: str | None = None
    """HOST or HOST:PORT where the nodes rendezvous; None takes the Slurm step's."""

    join_timeout: float | None = None
    """Seconds within which all nodes must join; None takes the default."""

    spares: int = 0
    """How many of the nodes only take the place of a lost one."""

    node_timeout: float | None = None
    """Seconds without a sign of a node after which it is lost; None takes the default."""

    restarts: int = 0
    """How often the run restarts after a failure."""


@dataclass(frozen=True, kw_only=True)
class Nodes:
    """The nodes that one run is started on, by a `launcher run` on each."""

    count: int
    """The number of nodes whose ranks train; the largest if the run may go on with fewer."""

    host: str
    """Name or address of the first node, where all nodes rendezvous."""

    port: int
    index: int | None
    """Index of this node; None if the rendezvous assigns it."""

    names: tuple[str, ...] = ()
    """Names of all nodes; empty if unknown."""

    join_timeout: float = 300.0
    """Seconds within which all nodes must join the rendezvous."""

    min_count: int | None = None
    """The smallest number of nodes with which the run goes on; None is `count`."""

    spares: int = 0
    """Further nodes that are started, and wait to take the place of a lost one."""

    node_timeout: float = 20.0
    """Seconds without a sign of a node after which it is lost."""

    @property
    def launchers(self) -> int:
        """The number of launchers that are started."""
        return self.count + self.spares


def find_nodes(request: NodesRequest, env: Mapping[str, str] | None = None) -> Nodes | None:
    """Return the nodes of the run to start; None if it runs on this node alone.

    Args:
        request: What is asked for.
        env: The environment; None reads this process's.

    Raises:
        UsageError: Several nodes are asked for without a rendezvous, or the other way round; or
            spares or fewer nodes without restarts, or where there are none.
        WorldError: Slurm started anything else than one launcher on each node.
    """
    env = os.environ if env is None else env
    step = find_step(env)
    count, rendezvous = request.count, request.rendezvous
    _check_restarts(request)
    if _HOSTS in env:
        nodes: Nodes | None = _nodes_over_ssh(env)
    elif rendezvous is not None:
        nodes = _nodes_at(request, rendezvous, env.get(_KUBERNETES_INDEX))
    elif step is not None and step.num_tasks > 1:
        nodes = _nodes_of_step(step)
        nodes = with_spares(nodes, request, f"the job step has {nodes.count}")
    elif count is None or count == (1, 1):
        _check_alone(request)
        return None
    else:
        raise UsageError(
            f"--nodes {count_text(count)} needs a rendezvous: start `launcher run ... --nodes "
            f"{count_text(count)} --rendezvous HOST` on each node, where HOST is a name of the "
            "first node; or list all nodes with --hosts; or start the command with srun, one task "
            "on each node."
        )
    if nodes is None:
        return None
    return replace(
        nodes,
        join_timeout=request.join_timeout or nodes.join_timeout,
        node_timeout=request.node_timeout or nodes.node_timeout,
    )


def count_text(count: tuple[int, int]) -> str:
    """Return a number of nodes, or a range of it, as it is typed."""
    low, high = count
    return str(high) if low == high else f"{low}:{high}"


def with_spares(nodes: Nodes, request: NodesRequest, found: str) -> Nodes:
    """Return given nodes, some of which are spares, as a request says.

    Args:
        nodes: All nodes that there are.
        request: What is asked for.
        found: How many there are, for a message.

    Raises:
        WorldError: They are too few or too many.
    """
    total, spares = nodes.count, request.spares
    low, high = request.count or (total - spares, total - spares)
    asked = f"--nodes {count_text(request.count)}" if request.count else ""
    asked += (" " if asked and spares else "") + (f"--spares {spares}" if spares else "")
    is_too_many = request.count is not None and total > high + spares
    if total - spares < max(low, 1) or is_too_many:
        raise WorldError(
            f"{asked} was asked for, and {found}. Start as many nodes as the options say together, "
            "or leave them out."
        )
    count = total - spares
    return replace(nodes, count=count, min_count=min(low, count), spares=spares)


def _check_alone(request: NodesRequest) -> None:
    """Refuse options that mean nothing on one node.

    Raises:
        UsageError: There is one.
    """
    given = {"--spares": request.spares, "--node-timeout": request.node_timeout}
    for name, value in given.items():
        if value:
            raise UsageError(
                f"{name} {value:g} is for runs on several nodes, and this run has this node alone: "
                "list all nodes with --hosts, or start the command with srun or with --nodes and "
                "--rendezvous on each of them."
            )


def _check_restarts(request: NodesRequest) -> None:
    """Refuse options that mean nothing in a run that does not restart.

    Raises:
        UsageError: There is one.
    """
    if request.restarts:
        return
    low, high = request.count or (1, 1)
    if request.spares:
        raise UsageError(
            f"--spares {request.spares}: a spare node takes the place of a lost one when the run "
            "restarts. Add --max-restarts N."
        )
    if low < high:
        raise UsageError(
            f"--nodes {low}:{high}: a run changes its number of nodes when it restarts. Add "
            "--max-restarts N, or give one number."
        )


def is_over_ssh(env: Mapping[str, str] | None = None) -> bool:
    """Return whether another launcher has started this one over ssh."""
    return _HOSTS in (os.environ if env is None else env)


def nodes_of_hosts(hosts: Sequence[str], request: NodesRequest) -> Nodes:
    """Return the nodes that one launcher starts over ssh.

    Args:
        hosts: The nodes as ssh takes them: [USER@]HOST, or an alias of ssh's configuration.
        request: What is asked for. Its `rendezvous` is HOST[:PORT] of the first node, if the others
            know it by another name.

    Raises:
        UsageError: A node is listed twice, the others cannot reach the first by its name, or the
            request contradicts the hosts.
    """
    _check_restarts(request)
    rendezvous = request.rendezvous
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
    nodes = Nodes(count=len(hosts), host=host, port=port, index=None, names=tuple(hosts))
    return with_spares(nodes, request, f"--hosts names {len(hosts)}")


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
        _COUNTS: f"{nodes.min_count or nodes.count}:{nodes.count}",
    }


def _nodes_over_ssh(env: Mapping[str, str]) -> Nodes | None:
    nodes = nodes_of_hosts(env[_HOSTS].split(","), NodesRequest(rendezvous=env[_RENDEZVOUS]))
    if nodes.count == 1:
        return None
    low, high = map(int, env.get(_COUNTS, f"{nodes.count}:{nodes.count}").split(":"))
    return replace(
        nodes, index=int(env[_INDEX]), min_count=low, count=high, spares=nodes.count - high
    )


def _nodes_at(request: NodesRequest, rendezvous: str, pod: str | None) -> Nodes | None:
    """Return the nodes that meet at an address.

    Args:
        request: What is asked for.
        rendezvous: HOST[:PORT] of the first node.
        pod: The index of this pod in Kubernetes, where the first pod need not have a name yet when
            another one starts; None elsewhere.

    Raises:
        UsageError: The number of nodes is missing, or the address is malformed.
        WorldError: The index of the pod does not fit.
    """
    if request.count is None:
        raise UsageError(
            f"--rendezvous {rendezvous} is for runs on several nodes: give their number as well, "
            "with --nodes M."
        )
    host, port = _read_address(rendezvous)
    low, count = request.count
    if count + request.spares == 1:
        return None
    if pod is not None and request.restarts:
        raise UsageError(
            f"--max-restarts {request.restarts}: Kubernetes starts the pods of a job again, so a "
            "run on several pods does not restart by itself. Leave --max-restarts, and with it "
            "--spares, out and give the Job a backoffLimit, or max_restarts in the cluster profile."
        )
    index = None if pod is None else digits(pod)
    if pod is not None and (index is None or index >= count):
        raise WorldError(
            f"{_KUBERNETES_INDEX}={pod} in the environment is not the index of one of --nodes "
            f"{count}. Give the Job as many completions as nodes, or unset the variable."
        )
    return Nodes(
        count=count, min_count=low, spares=request.spares, host=host, port=port, index=index
    )


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


def _nodes_of_step(step: SlurmStep) -> Nodes:
    num_nodes = len(step.tasks_per_node)
    if max(step.tasks_per_node) > 1:
        raise WorldError(
            f"srun started launcher {step.num_tasks} times on {num_nodes} node"
            f"{'s' if num_nodes > 1 else ''}, but one launcher starts all ranks of a node. Use "
            "`srun --ntasks-per-node=1 launcher run ... -n RANKS`, or run the recipe's file "
            f"without launcher: `srun -n {step.num_tasks} python RECIPE.py`."
        )
    return Nodes(
        count=num_nodes,
        host=step.hosts[0],
        port=step.port,
        index=step.node,
        names=step.hosts,
        join_timeout=_JOIN_TIMEOUT_IN_SLURM,
    )
