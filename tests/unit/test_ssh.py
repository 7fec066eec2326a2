"""Runs on two machines from one terminal: network namespaces with an ssh server in each."""

from __future__ import annotations

from pathlib import Path

import pytest

from launcher.cli.machines import remove_options
from launcher.environment.nodes import (
    NodesRequest,
    find_nodes,
    nodes_environment,
    nodes_of_hosts,
)
from launcher.errors import UsageError
from launcher.launch.forwarded_variables import (
    forwarded_variables,
    named_variables,
    variables_in_files,
)


def test_machines_know_their_place() -> None:
    """A node reads its index, the first host and the port from the environment that is set."""
    nodes = nodes_of_hosts(["me@a", "b"], NodesRequest())
    assert (nodes.host, nodes.port, nodes.count) == ("a", 29_400, 2)
    second = find_nodes(NodesRequest(join_timeout=7.0), nodes_environment(nodes, 1))
    assert second is not None
    assert (second.index, second.host, second.names) == (1, "a", ("me@a", "b"))
    assert second.join_timeout == 7.0
    v6 = nodes_of_hosts(["me@fe80::1", "b"], NodesRequest())
    assert v6.host == "fe80::1"
    assert find_nodes(NodesRequest(), nodes_environment(v6, 0)) is not None
    with pytest.raises(UsageError, match="--hosts localhost,b"):
        nodes_of_hosts(["localhost", "b"], NodesRequest())
    assert nodes_of_hosts(["localhost", "b"], NodesRequest(rendezvous="a:1234")).port == 1234


def test_hosts_are_nodes_and_spares() -> None:
    """The launchers on the hosts know how many of them train, at least and at most."""
    request = NodesRequest(count=(1, 2), spares=1, restarts=2)
    nodes = nodes_of_hosts(["a", "b", "c"], request)
    third = find_nodes(NodesRequest(restarts=2), nodes_environment(nodes, 2))
    for found in (nodes, third):
        assert found is not None
        assert (found.min_count, found.count, found.spares, found.launchers) == (1, 2, 1, 3)
    with pytest.raises(UsageError, match="--spares 2 was asked for, and --hosts names 2"):
        nodes_of_hosts(["a", "b"], NodesRequest(spares=2, restarts=1))


def test_options_are_removed_in_both_forms() -> None:
    """`remove_options` removes options that are written as two words or with an equals sign."""
    arguments = ["run", "x", "--hosts", "a,b", "--ssh=ssh -p 2", "-n", "2", "lr=1", "--nodes", "2"]
    remaining = remove_options(arguments, ("--hosts", "--ssh", "--nodes"))
    assert remaining == ["run", "x", "-n", "2", "lr=1"]


@pytest.mark.parametrize(
    ("arguments", "remaining"),
    [
        (["-x", "A=1", "-n", "2"], ["-n", "2"]),
        (["-xA=1", "-q"], ["-q"]),
        (["-qx", "A", "lr=1"], ["-q", "lr=1"]),
        (["-qxA=-x", "lr=1"], ["-q", "lr=1"]),
        (["--forward=A", "--forward", "B=2", "x"], ["x"]),
        (["-n2", "exec=-x"], ["-n2", "exec=-x"]),
    ],
)
def test_options_of_a_letter_are_removed(arguments: list[str], remaining: list[str]) -> None:
    """`remove_options` removes a short option with its value, joined to it or not."""
    assert remove_options(arguments, ("--forward", "-x")) == remaining


def test_files_of_deepspeed_are_read(tmp_path: Path) -> None:
    """DS_ENV_FILE names the files; quotes are removed; each bad line is named by its number."""
    home, folder = tmp_path / "home", tmp_path / "project"
    for path in (home, folder):
        path.mkdir()
    (home / "mine").write_text("A=1\nB='x y'\nC=\n\n# D=4\n=5\nE 6\nexport F=7\n")
    (folder / "mine").write_text("A=2\nRANK=1\nURL=https://me:pass@host/\nHF_TOKEN=abc\n")
    (home / ".deepspeed_env").write_text("G=8\n")
    warnings: list[str] = []
    found = variables_in_files({"DS_ENV_FILE": "mine"}, home, folder, warnings.append)
    assert found == {"A": "2", "B": "x y", "C": ""}
    places = [warning.partition(": ")[0] for warning in warnings]
    assert places == [f"{home}/mine, line {line}" for line in (6, 7, 8)] + [
        f"{folder}/mine, line {line}" for line in (2, 3, 4)
    ]
    assert not any("pass" in warning.partition("is left")[0] for warning in warnings)
    assert "--forward HF_TOKEN" in warnings[-1]


def test_a_file_of_variables_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A folder or bytes in place of the file are a warning, and the home folder's file counts."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home/.deepspeed_env").write_bytes(b"A=\xff\n")
    (tmp_path / ".deepspeed_env").mkdir()
    warnings: list[str] = []
    assert variables_in_files({}, tmp_path / "home", tmp_path, warnings.append) == {}
    assert [".deepspeed_env is left out: " in warning for warning in warnings] == [True, True]


def test_named_variables() -> None:
    """A name takes its value from the terminal, a later assignment wins, secrets are passed on."""
    env = {"HF_TOKEN": "abc", "A": "1"}
    assert named_variables(("HF_TOKEN", "A", "B=x=y", "A=2"), env) == {
        "HF_TOKEN": "abc",
        "A": "2",
        "B": "x=y",
    }


@pytest.mark.parametrize("assignment", ["", "=1", "A B=1", "A-B", "C", "RANK", "SLURM_JOB_ID=3"])
def test_bad_names_of_variables_are_refused(assignment: str) -> None:
    """Names that no variable has, that are not set, or that launcher sets, are refused."""
    with pytest.raises(UsageError, match=f"--forward {assignment.partition('=')[0]}:"):
        named_variables((assignment,), {"RANK": "1"})


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
