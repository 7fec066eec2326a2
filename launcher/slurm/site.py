"""Site profiles: the properties of a cluster that hold for every job."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from launcher.errors import SlurmError
from launcher.recipe.validation import NonNegativeInt, PositiveFloat, PositiveInt, brief
from launcher.schedulers.hardware import NodeHardware
from launcher.schedulers.site_profile import (
    Line,
    check_environment,
    find_profile,
    read_profile,
    read_time,
)


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site profile. What it does not set is left to Slurm's defaults."""

    partition: Line | None = None
    """Partition that jobs run in."""

    account: Line | None = None
    """Account that jobs are charged to."""

    qos: Line | None = None
    """Quality of service."""

    reservation: Line | None = None
    """Reservation whose nodes jobs use."""

    mail_type: Line | None = None
    """Events that are mailed, such as END,FAIL."""

    mail_user: Line | None = None
    """Address that the mail goes to. Default: the user who submits."""

    gpus_per_node: NonNegativeInt | None = None
    """GPUs of a node; jobs that ask for more are refused."""

    gpu_type: Line | None = None
    """Type of the GPUs, as in --gpus-per-node=a100:4."""

    cpus_per_node: PositiveInt | None = None
    """Cores of a node; jobs that ask for more are refused."""

    memory_per_node: Line | None = None
    """Memory of a node, such as 480G; a job gets the share of the GPUs or cores that it uses."""

    time: Line | None = None
    """Default time limit of a job, such as 12:00:00."""

    max_time: Line | None = None
    """Longest time limit that a job may ask for."""

    modules: tuple[Line, ...] = ()
    """Modules that the script loads on the first node; tasks inherit the environment."""

    setup: tuple[Line, ...] = ()
    """Lines of shell code that run unchanged before the ranks start."""

    env: Mapping[str, Line] = field(default_factory=dict)
    """Environment variables of the ranks."""

    container: Line | None = None
    """Container image that the ranks run in."""

    container_runtime: Literal["pyxis", "apptainer", "docker"] = "pyxis"
    """What starts the container: Slurm's plugin Pyxis (`srun --container-image`), Apptainer or
    Docker on the nodes."""

    container_mounts: tuple[Line, ...] = ()
    """Folders of the host that the container mounts, as FOLDER:FOLDER."""

    python: Line | None = None
    """Python interpreter on the nodes. Default: the one that submits."""

    interface: Line | None = None
    """Network interface between nodes, for gloo and NCCL."""

    scratch: Line | None = None
    """Folder for temporary files on a local disk of each node."""

    link_gigabytes: PositiveFloat | None = None
    """GB/s from one GPU to the others of its node, for `launcher plan --estimate`."""

    link_microseconds: PositiveFloat | None = None
    """Latency of a message between the GPUs of a node, in microseconds."""

    network_gigabits: PositiveFloat | None = None
    """Gbit/s from one node to the others."""

    network_microseconds: PositiveFloat | None = None
    """Latency of a message between nodes, in microseconds."""

    mtbf_hours: PositiveFloat | None = None
    """Mean time between failures of a GPU (of a node for CPU ranks), in hours."""

    restart_seconds: PositiveFloat | None = None
    """Seconds from a failure to the next step."""

    price_per_hour: PositiveFloat | None = None
    """Price of a GPU (of a node for CPU ranks) for an hour."""

    warning_seconds: PositiveInt = 120
    """Seconds before its time limit at which a job is told to save a checkpoint."""

    max_requeues: NonNegativeInt = 20
    """How many times a stopped job is requeued."""

    health: Literal["off", "quick", "full"] = "quick"
    """How nodes are examined before ranks start on them; see `--health`."""

    code_limit: PositiveInt = 100
    """Megabytes that the copy of a project in a run folder may have."""

    sbatch: tuple[Line, ...] = ()
    """Further options of sbatch, such as --constraint=h100."""

    @property
    def hardware(self) -> NodeHardware:
        """The resources of a node."""
        memory = self.memory_per_node
        return NodeHardware(
            gpus=self.gpus_per_node,
            cpus=self.cpus_per_node,
            memory_bytes=None if memory is None else read_memory(memory, "memory_per_node") * 2**20,
        )


def find_site(name: str | None, env: Mapping[str, str] | None = None) -> Site:
    """Read a site profile.

    Args:
        name: A YAML file, or the name of one in slurm/ or ~/.config/launcher/; None is the value of
            LAUNCHER_CLUSTER or, without that, an empty profile.
        env: The environment; None is that of this process.

    Raises:
        SlurmError: There is no such profile, or something in it is wrong.
    """
    env = os.environ if env is None else env
    name = name or env.get("LAUNCHER_CLUSTER")
    if not name:
        return Site()
    return read_site(find_profile(name, "slurm", "launcher", env, SlurmError))


def read_site(path: Path) -> Site:
    """Read a site profile from a YAML file.

    Raises:
        SlurmError: A key is unknown, or a value does not fit.
    """
    site = read_profile(path, Site, SlurmError)
    check_environment(site.env, path, SlurmError)
    for name in ("time", "max_time"):
        if (text := getattr(site, name)) is not None:
            read_time(text, f"{path}: {name}", SlurmError)
    if site.memory_per_node is not None:
        read_memory(site.memory_per_node, f"{path}: memory_per_node")
    return site


def time_text(seconds: int) -> str:
    """Return seconds in Slurm's notation, d-hh:mm:ss."""
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def read_memory(text: str, what: str) -> int:
    """Return the MiB of a size in Slurm's notation: a number of MiB, or with K, M, G or T.

    Args:
        text: The size.
        what: What the size is for, in the error.

    Raises:
        SlurmError: The text is not a size.
    """
    match = re.fullmatch(r"([0-9]{1,15})([KMGT]?)", text.upper())
    if match is None:
        raise SlurmError(f"{what}: expected a size such as 480G; found {brief(repr(text))}.")
    return (
        int(match[1]) * {"K": 1, "": 1024, "M": 1024, "G": 1024**2, "T": 1024**3}[match[2]] // 1024
    )
