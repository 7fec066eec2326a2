"""Runs on two machines from one terminal: network namespaces with an ssh server in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli.machines import remove_options
from launcher.environment.nodes import find_nodes, nodes_environment, nodes_of_hosts
from launcher.errors import UsageError
from launcher.launch.forwarded_variables import forwarded_variables


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


@pytest.mark.parametrize(
    ("name", "value", "forwarded"),
    [
        ("NCCL_SOCKET_IFNAME", "eth0", "eth0"),
        ("CUDA_VISIBLE_DEVICES", "0,1", "0,1"),
        ("HF_HOME", "/data/hf", "/data/hf"),
        ("TORCH_HOME", "", ""),
        ("OMP_NUM_THREADS", "4", "4"),
        ("WANDB_MODE", "offline", "offline"),
        ("PYTHONPATH", ":src:/opt/code", "/project:/project/src:/opt/code"),
        ("HF_TOKEN", "x", None),
        ("WANDB_API_KEY", "0123456789", None),
        ("MLFLOW_TRACKING_URI", "https://me:pass@host/", None),
        ("MLFLOW_TRACKING_URI", "https://host/", "https://host/"),
        ("AWS_REGION", "eu", None),
        ("RANK", "3", None),
        ("TORCHELASTIC_RUN_ID", "1", None),
        ("PATH", "/bin", None),
    ],
)
def test_variables_are_forwarded_without_secrets(
    name: str, value: str, forwarded: str | None
) -> None:
    """Variables of libraries that train are passed on; keys, ranks and others are not."""
    assert forwarded_variables({name: value}, Path("/project")).get(name) == forwarded
