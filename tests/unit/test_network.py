"""The network interface of runs on several nodes, in network namespaces of this machine."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launcher.environment.network import interface_variables

needs_namespaces = pytest.mark.skipif(
    os.geteuid() != 0 or shutil.which("unshare") is None or shutil.which("ip") is None,
    reason="network namespaces need root, unshare and ip",
)


def interface_in_namespace(tmp_path: Path, host: str, hosts: str, *commands: str) -> str:
    """Return what `interface_to` returns in a network with an /etc/hosts of its own.

    Args:
        tmp_path: An empty folder.
        host: The host to reach.
        hosts: The content of /etc/hosts.
        commands: Commands that set up the network.
    """
    file = tmp_path / "hosts"
    file.write_text(hosts)
    ask = "from launcher.environment.network import interface_to; import sys; "
    ask += "print(interface_to(sys.argv[1]))"
    script = " && ".join(
        [
            f"mount --bind {file} /etc/hosts",
            "ip link set lo up",
            *commands,
            f"{sys.executable} -c '{ask}' {host}",
        ]
    )
    command = ["unshare", "--net", "--mount", "sh", "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


LINK = (
    "ip link add docker0 type veth peer name eth7",
    "ip address add 172.17.0.1/16 dev docker0",
    "ip address add 10.1.2.3/24 dev eth7",
    "ip link set docker0 up",
    "ip link set eth7 up",
)


@needs_namespaces
@pytest.mark.parametrize(
    ("host", "route", "interface"),
    [
        ("node1", True, "eth7"),  # Debian: the own name is 127.0.1.1
        ("node1", False, "eth7"),
        ("node2", True, "eth7"),
        ("localhost", True, "lo"),
        ("127.0.0.1", True, "lo"),
        ("nowhere", True, "None"),
    ],
)
def test_several_nodes_do_not_meet_on_loopback(
    tmp_path: Path, host: str, interface: str, *, route: bool
) -> None:
    """Loopback is taken only for a loopback host, also where the own name leads to 127.0.1.1."""
    hosts = "127.0.0.1 localhost\n127.0.1.1 node1\n10.1.2.4 node2\n"
    commands = (*LINK, *(("ip route add default via 10.1.2.1",) if route else ()))
    assert interface_in_namespace(tmp_path, host, hosts, *commands) == interface


def test_nccl_gets_the_exact_name() -> None:
    """NCCL would take a plain name for the beginning of several: bond0 also for bond0.100."""
    assert interface_variables("bond0") == {
        "GLOO_SOCKET_IFNAME": "bond0",
        "NCCL_SOCKET_IFNAME": "=bond0",
    }
