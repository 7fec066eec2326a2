"""Site profiles: the properties of a cluster that hold for every job."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

from msgspec import Meta

from launcher.errors import SlurmError, did_you_mean
from launcher.paths import exists, is_dir
from launcher.recipe.overrides import read_yaml
from launcher.recipe.validation import (
    MismatchError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    brief,
    convert,
)

Line = Annotated[str, Meta(pattern=r"^[^\n\r\0]*$", description="text of one line")]
"""Text of one line, as a batch script can hold it."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """A site profile. What it does not set is left to Slurm's defaults."""

    partition: Line | None = None
    """Partition that jobs run in."""

    account: Line | None = None
    """Account that jobs are charged to."""

    qos: Line | None = None
    """Quality of service."""

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
    """Container image for `srun --container-image` (Pyxis)."""

    container_mounts: tuple[Line, ...] = ()
    """Folders of the host that the container mounts."""

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
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    folders = (Path("slurm"), home / "launcher")
    paths = [Path(name), *(folder / f"{name}.yaml" for folder in folders)]
    profile = next((path for path in paths if _is_profile(path)), None)
    if profile is None:
        profiles = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        raise SlurmError(
            f"--cluster {name}: there is no such site profile."
            + did_you_mean(name, profiles)
            + f" Looked for {', '.join(map(str, paths))}. slurm/README.md describes profiles."
        )
    return read_site(profile)


def _is_profile(path: Path) -> bool:
    """Return whether a path leads to something else than a folder, which has a name to look up."""
    return exists(path) and not is_dir(path)


def read_site(path: Path) -> Site:
    """Read a site profile from a YAML file.

    Raises:
        SlurmError: A key is unknown, or a value does not fit.
    """
    hints = get_type_hints(Site, include_extras=True)
    values: dict[str, Any] = {}
    for entry in read_yaml(path, as_text=True):
        if entry.name not in hints:
            raise SlurmError(
                f"{entry.source}: unknown key {entry.name!r} in the site profile."
                + did_you_mean(entry.name, hints)
                + f" The keys are {', '.join(item.name for item in fields(Site))}."
            )
        try:
            values[entry.name] = convert(entry.value, hints[entry.name], "text")
        except MismatchError as error:
            raise SlurmError(f"{entry.source}: {entry.name}: {error}.") from None
    site = Site(**values)
    for name in site.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SlurmError(
                f"{path}: env: {name!r} is not a valid name of an environment variable."
            )
    for name in ("time", "max_time"):
        if (text := getattr(site, name)) is not None:
            read_time(text, f"{path}: {name}")
    if site.memory_per_node is not None:
        read_memory(site.memory_per_node, f"{path}: memory_per_node")
    return site


def read_time(text: str, what: str) -> int:
    """Return the seconds of a time in Slurm's notation: minutes, h:mm:ss, d-h or d-hh:mm:ss.

    Args:
        text: The time.
        what: What the time is for, in the error.

    Raises:
        SlurmError: The text is not a time.
    """
    match = re.fullmatch(
        r"(?:([0-9]{1,6})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", text
    )
    if match is None:
        raise SlurmError(
            f"{what}: expected a time such as 90 (minutes), 12:00:00 or 2-00:00:00; "
            f"found {brief(repr(text))}."
        )
    days, first, second, third = (int(group) if group else None for group in match.groups())
    assert first is not None
    if days is not None:
        return days * 86_400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


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
