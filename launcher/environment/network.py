"""The network interface through which the ranks of several nodes reach each other."""

from __future__ import annotations

import ipaddress
import os
import platform
import socket

import psutil

from launcher.errors import WorldError
from launcher.recipe.validation import brief

_ANYWHERE = "192.0.2.1"
"""An address that is reserved for documentation (RFC 5737): only a default route leads to it."""

_BRIDGES = ("docker", "br-", "virbr", "cni", "flannel", "podman")
"""Prefixes of the names of interfaces that lead to containers of this machine alone."""


INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Variables that name the interfaces of gloo and NCCL."""


FORK_SAFETY = {"RDMAV_FORK_SAFE": "1", "FI_EFA_FORK_SAFE": "1"}
"""Variables that let a process fork, as a rank does for its DataLoader workers, after NCCL has
opened InfiniBand or Elastic Fabric Adapters. Without them, older kernels and libraries corrupt the
memory of the parent."""


def interface_to(host: str) -> str | None:
    """Return the network interface through which this machine reaches `host`, or None if unknown.

    By default, gloo takes the interface of this machine's own host name, which Debian and Ubuntu
    map to loopback (127.0.1.1), and NCCL takes the first one, which may be a container bridge.

    Loopback is returned only if `host` itself is a name or an address of loopback, with which all
    ranks are on this machine. If this machine's own name leads there, the interface of the default
    route is returned or, without one, the first interface with an IPv4 address.

    Args:
        host: Name or address of the node of rank 0.
    """
    local = _local_address(host)
    if local is None:
        return None
    if _is_loopback(local) and not (host == "localhost" or _is_loopback(host)):
        return _outgoing_interface()
    return _interface_of(local)


def own_address(host: str) -> str | None:
    """Return the address at which other nodes of a run reach this machine; None if unknown.

    It is one of the interface that GLOO_SOCKET_IFNAME names, or else of that towards `host`.

    Args:
        host: Name or address of the node of rank 0.
    """
    named = os.environ.get("GLOO_SOCKET_IFNAME", "").partition(",")[0]
    interface = named or interface_to(host)
    found = psutil.net_if_addrs().get(interface or "", [])
    for family in (socket.AF_INET, socket.AF_INET6):
        for each in found:
            if each.family == family and not each.address.startswith("fe80:"):
                return str(each.address)
    return None


def interface_variables(interface: str) -> dict[str, str]:
    """Return the variables that make gloo and NCCL use one network interface.

    For NCCL a name stands for all names that begin with it, bond0 also for bond0.100, unless `=`
    precedes it.
    """
    gloo, nccl = INTERFACE_VARIABLES
    return {gloo: interface, nccl: f"={interface}"}


def check_interfaces() -> None:
    """Check that this machine has the interfaces of GLOO_SOCKET_IFNAME.

    Raises:
        WorldError: It lacks one.
    """
    text = os.environ.get("GLOO_SOCKET_IFNAME", "")
    present = psutil.net_if_addrs()
    for name in filter(None, text.split(",")):
        if name not in present:
            raise WorldError(
                f"GLOO_SOCKET_IFNAME={brief(repr(text))} in the environment: {platform.node()} has "
                f"no network interface {brief(name)}, it has {', '.join(present)}. Name one of "
                "them, or unset the variable to use the interface that reaches rank 0."
            )


def _local_address(host: str) -> str | None:
    """Return the address that this machine sends from to reach `host`; None if it cannot."""
    try:
        family, kind, _, _, address = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(address)  # sends nothing
            return str(probe.getsockname()[0])
    except (OSError, UnicodeError):  # the name has a part that is empty or too long
        return None


def _outgoing_interface() -> str | None:
    """Return the interface of the default route, or the first one that leads to a network."""
    local = _local_address(_ANYWHERE)
    if local is not None and (name := _interface_of(local)) is not None:
        return name
    states = psutil.net_if_stats()
    for name, addresses in psutil.net_if_addrs().items():
        is_up = name in states and states[name].isup
        if is_up and not name.startswith(_BRIDGES) and any(map(_leads_to_a_network, addresses)):
            return str(name)
    return None


def _leads_to_a_network(address: psutil._common.snicaddr) -> bool:
    return address.family == socket.AF_INET and not _is_loopback(address.address)


def _interface_of(local_address: str) -> str | None:
    for name, addresses in psutil.net_if_addrs().items():
        if any(address.address == local_address for address in addresses):
            return str(name)
    return None


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address).is_loopback
    except ValueError:  # a name
        return False
