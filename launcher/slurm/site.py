"""What is true of a cluster, whatever runs on it: a site profile, as a value."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, get_type_hints

from msgspec import Meta

from launcher.errors import SlurmError, did_you_mean
from launcher.recipe.overrides import read_yaml
from launcher.recipe.validation import (
    MismatchError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    convert,
)

Line = Annotated[str, Meta(pattern=r"^[^\n\r\0]*$", description="text of one line")]
"""Text that can be written into a batch script."""


@dataclass(frozen=True, kw_only=True)
class Site:
    """What a site profile says; what it leaves out is Slurm's default."""

    partition: Line | None = None
    """Where jobs run."""

    account: Line | None = None
    """Whom jobs are charged to."""

    qos: Line | None = None
    """Quality of service."""

    gpus_per_node: NonNegativeInt | None = None
    """GPUs of a node; more are refused."""

    gpu_type: Line | None = None
    """Their type, as in --gpus-per-node=a100:4."""

    cpus_per_node: PositiveInt | None = None
    """Cores of a node; more are refused."""

    memory_per_node: Line | None = None
    """Memory of a node, such as 480G; a job that takes part of a node gets a part of it."""

    time: Line | None = None
    """What a job gets unless --time says otherwise, such as 12:00:00."""

    max_time: Line | None = None
    """The longest that a job may take; longer ones are refused."""

    modules: tuple[Line, ...] = ()
    """Loaded with `module load` on the first node; tasks get their environment."""

    setup: tuple[Line, ...] = ()
    """Lines of shell, run as they are before the ranks are started."""

    env: Mapping[str, Line] = field(default_factory=dict)
    """Environment variables of the ranks."""

    container: Line | None = None
    """An image for `srun --container-image` (Pyxis)."""

    container_mounts: tuple[Line, ...] = ()
    """What it sees of the host."""

    python: Line | None = None
    """The interpreter on the nodes; by default the one that submits."""

    interface: Line | None = None
    """The network interface between nodes, for gloo and NCCL."""

    scratch: Line | None = None
    """A folder on a local disk of each node, for temporary files."""

    link_gigabytes: PositiveFloat | None = None
    """GB/s that a GPU sends to the others of its node, for `launcher plan --estimate`."""

    link_microseconds: PositiveFloat | None = None
    """Latency of a message between them."""

    network_gigabits: PositiveFloat | None = None
    """Gbit/s that a node sends to others."""

    network_microseconds: PositiveFloat | None = None
    """Latency of a message between nodes."""

    mtbf_hours: PositiveFloat | None = None
    """Mean time between failures that end a run, for each GPU; on CPUs, for each node."""

    restart_seconds: PositiveFloat | None = None
    """From a failure to the first step again."""

    price_per_hour: PositiveFloat | None = None
    """Of a GPU; on CPUs, of a node."""

    warning_seconds: PositiveInt = 120
    """How long before its end a job is told, to save a checkpoint."""

    max_requeues: NonNegativeInt = 20
    """How often a job is put back into the queue."""

    sbatch: tuple[Line, ...] = ()
    """Further options of sbatch, such as --constraint=h100."""


def find_site(name: str | None, env: Mapping[str, str] | None = None) -> Site:
    """Read the profile `name`: a YAML file, or one of that name in slurm/ or the user's folder.

    None takes what LAUNCHER_CLUSTER names, or else no profile.

    Raises:
        SlurmError: There is none, or something in it is wrong.
    """
    env = os.environ if env is None else env
    name = name or env.get("LAUNCHER_CLUSTER")
    if not name:
        return Site()
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    folders = (Path("slurm"), home / "launcher")
    paths = [Path(name), *(folder / f"{name}.yaml" for folder in folders)]
    found = next((path for path in paths if path.is_file()), None)
    if found is None:
        known = sorted({path.stem for folder in folders for path in folder.glob("*.yaml")})
        raise SlurmError(
            f"--cluster {name}: no such profile." + did_you_mean(name, known) + " Looked for "
            f"{', '.join(map(str, paths))}. slurm/README.md says what belongs there."
        )
    return read_site(found)


def read_site(path: Path) -> Site:
    """Read a profile.

    Raises:
        SlurmError: A name in it is unknown, or a value does not fit.
    """
    hints = get_type_hints(Site, include_extras=True)
    values: dict[str, Any] = {}
    for each in read_yaml(path, as_text=True):
        if each.name not in hints:
            raise SlurmError(
                f"{each.source}: {each.name} is nothing of a site profile."
                + did_you_mean(each.name, hints)
                + f" There is {', '.join(item.name for item in fields(Site))}."
            )
        try:
            values[each.name] = convert(each.value, hints[each.name], from_text=True)
        except MismatchError as error:
            raise SlurmError(f"{each.source}: {each.name}: {error}.") from None
    site = Site(**values)
    for name in site.env:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise SlurmError(f"{path}: env: {name!r} is no name of an environment variable.")
    for name in ("time", "max_time"):
        if (text := getattr(site, name)) is not None:
            read_time(text, f"{path}: {name}")
    if site.memory_per_node is not None:
        read_memory(site.memory_per_node, f"{path}: memory_per_node")
    return site


def read_time(text: str, what: str) -> int:
    """Return the seconds of a time as Slurm writes it: minutes, h:mm:ss, d-h, d-hh:mm:ss.

    Raises:
        SlurmError: It is none.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if found is None:
        raise SlurmError(
            f"{what}: expected a time such as 90 (minutes), 12:00:00 or 2-00:00:00; found {text!r}."
        )
    days, first, second, third = (int(each) if each else None for each in found.groups())
    assert first is not None
    if days is not None:
        return days * 86_400 + first * 3600 + (second or 0) * 60 + (third or 0)
    if third is not None:
        return first * 3600 + (second or 0) * 60 + third
    return first * 60 + (second or 0)


def time_text(seconds: int) -> str:
    """Return seconds as Slurm writes them."""
    days, rest = divmod(seconds, 86_400)
    clock = f"{rest // 3600:02}:{rest % 3600 // 60:02}:{rest % 60:02}"
    return f"{days}-{clock}" if days else clock


def read_memory(text: str, what: str) -> int:
    """Return the MiB of a size as Slurm writes it: MiB, or with K, M, G, T.

    Raises:
        SlurmError: It is none.
    """
    found = re.fullmatch(r"(\d+)([KMGT]?)", text.upper())
    if found is None:
        raise SlurmError(f"{what}: expected a size such as 480G; found {text!r}.")
    return (
        int(found[1]) * {"K": 1, "": 1024, "M": 1024, "G": 1024**2, "T": 1024**3}[found[2]] // 1024
    )
