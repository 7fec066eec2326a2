"""Profiles of hosts that ssh reaches."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from launcher.errors import SchedulerError
from launcher.recipe.validation import NonNegativeInt, PositiveInt
from launcher.schedulers.hardware import NodeHardware
from launcher.schedulers.site_profile import Line, find_profile, read_profile


@dataclass(frozen=True, kw_only=True)
class Hosts:
    """A profile of hosts with the same files under the same paths."""

    hosts: tuple[Line, ...]
    """The hosts as ssh takes them. Launchers meet on the first one."""

    ssh: Line | None = None
    """Command that reaches a host. Default: ssh in batch mode."""

    rendezvous: Line | None = None
    """HOST[:PORT] of the first host, if the others know it by another name."""

    forward: tuple[Line, ...] = ()
    """Further variables that the hosts get, as NAME or NAME=VALUE."""

    gpus_per_node: NonNegativeInt | None = None
    """GPUs of a host; runs that ask for more are refused."""

    cpus_per_node: PositiveInt | None = None
    """Cores of a host."""

    @property
    def hardware(self) -> NodeHardware:
        """The resources of a host."""
        return NodeHardware(gpus=self.gpus_per_node, cpus=self.cpus_per_node, memory_bytes=None)


def find_hosts(name: str | None, env: Mapping[str, str]) -> Hosts:
    """Read a profile of hosts.

    Args:
        name: A YAML file, or the name of one in ssh/ or ~/.config/launcher/ssh/.
        env: The environment.

    Raises:
        SchedulerError: There is no such profile, or something in it is wrong.
    """
    if name is None:
        raise SchedulerError(
            "--to ssh needs a profile with the hosts: write `hosts: [node1, node2]` into a YAML "
            "file, and give it with --cluster."
        )
    path = find_profile(name, "ssh", "launcher/ssh", env, SchedulerError)
    return read_profile(path, Hosts, SchedulerError)
