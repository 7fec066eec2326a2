"""The ports of InfiniBand and RoCE adapters, from the files of the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, kw_only=True)
class InfinibandPort:
    """A port of a network adapter that can write to the memory of other nodes (RDMA)."""

    device: str
    """Name of the adapter, such as `mlx5_0`."""

    port: str
    state: str | None
    """Logical state, such as `ACTIVE`, `INIT` or `DOWN`; None if it cannot be read."""

    gigabits: float | None
    """Rate of the link in gigabits per second."""

    link_layer: str | None
    """`InfiniBand`, or `Ethernet` for RoCE."""


def read_infiniband(root: Path = Path("/")) -> tuple[InfinibandPort, ...]:
    """Return the ports of all adapters, in the order of their names.

    Args:
        root: Root of the files of /sys that are read.
    """
    folders = (root / "sys/class/infiniband").glob("*/ports/*")
    return tuple(
        InfinibandPort(
            device=folder.parents[1].name,
            port=folder.name,
            state=_after_colon(_read(folder / "state")),
            gigabits=_leading_number(_read(folder / "rate")),
            link_layer=_read(folder / "link_layer"),
        )
        for folder in sorted(folders)
    )


def _after_colon(text: str | None) -> str | None:
    """Return the name in a line such as `4: ACTIVE`."""
    return None if text is None else text.rpartition(":")[2].strip()


def _leading_number(text: str | None) -> float | None:
    """Return the number in a line such as `200 Gb/sec (4X HDR)`."""
    try:
        return float((text or "").split()[0])
    except (IndexError, ValueError):
        return None


def _read(path: Path) -> str | None:
    """Return the text of a file; None if it cannot be read, as where an adapter is in trouble."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return None
