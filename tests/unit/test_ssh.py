"""Runs on two machines from one terminal: network namespaces with an ssh server in each."""

from __future__ import annotations

import pytest

from launcher.cli.machines import remove_options
from launcher.environment.nodes import find_nodes, nodes_environment, nodes_of_hosts
from launcher.errors import UsageError


def test_machines_know_their_place() -> None:
    """A node reads its index, the first host and the port from the environment that is set."""
    nodes = nodes_of_hosts(["me@a", "b"], None)
    assert (nodes.host, nodes.port, nodes.count) == ("a", 29_400, 2)
    second = find_nodes(None, None, 7.0, env=nodes_environment(nodes, 1))
    assert second is not None
    assert (second.index, second.host, second.names) == (1, "a", ("me@a", "b"))
    assert second.join_timeout == 7.0
    v6 = nodes_of_hosts(["me@fe80::1", "b"], None)
    assert v6.host == "fe80::1"
    assert find_nodes(None, None, env=nodes_environment(v6, 0)) is not None
    with pytest.raises(UsageError, match="--hosts localhost,b"):
        nodes_of_hosts(["localhost", "b"], None)
    assert nodes_of_hosts(["localhost", "b"], "a:1234").port == 1234


def test_options_are_removed_in_both_forms() -> None:
    """`remove_options` removes options that are written as two words or with an equals sign."""
    arguments = ["run", "x", "--hosts", "a,b", "--ssh=ssh -p 2", "-n", "2", "lr=1", "--nodes", "2"]
    remaining = remove_options(arguments, ("--hosts", "--ssh", "--nodes"))
    assert remaining == ["run", "x", "-n", "2", "lr=1"]
