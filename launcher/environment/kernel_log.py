"""Errors of NVIDIA's driver (Xid) in the log of the kernel since this machine was started."""

from __future__ import annotations

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

_XID = re.compile(r"NVRM: Xid \(PCI:([0-9a-fA-F:.]+)\): (\d+)(?:, ([^\n]*))?")
_RECORD_BYTES = 8192
"""Upper limit on a record of /dev/kmsg; Linux refuses a smaller buffer."""

_MAX_RECORDS = 1_000_000
_SECONDS = 10
"""Longest wait for `journalctl`."""


@dataclass(frozen=True, kw_only=True)
class Xid:
    """An error that NVIDIA's driver has written to the log of the kernel."""

    number: int
    """Number of the error in NVIDIA's catalogue of Xid errors."""

    pci_address: str
    """Address of the GPU on the PCI bus, without the function: `0000:3b:00`."""

    text: str
    """What follows the number in the log."""


def read_xids(root: Path = Path("/")) -> tuple[Xid, ...] | None:
    """Return the errors of the driver in the log of the kernel; None if it cannot be read.

    Args:
        root: Root of the files that are read, and of the program `journalctl`.
    """
    text = _read_kmsg(root / "dev/kmsg")
    if text is None:
        text = _read_journal(root / "usr/bin/journalctl")
    if text is None:
        return None
    return tuple(
        Xid(number=int(number), pci_address=address.lower(), text=words)
        for address, number, words in _XID.findall(text)
    )


def _read_kmsg(path: Path) -> str | None:
    """Return what /dev/kmsg holds, a record at each read; None if this user may not read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
    except OSError:
        return None
    records: list[bytes] = []
    try:
        for _ in range(_MAX_RECORDS):
            try:
                record = os.read(descriptor, _RECORD_BYTES)
            except BrokenPipeError:  # the kernel has overwritten the record: the next one follows
                continue
            except BlockingIOError:  # that was the last record
                break
            if not record:
                break
            records.append(record)
    except OSError:
        return None
    finally:
        os.close(descriptor)
    return b"".join(records).decode(errors="replace") if records else None


def _read_journal(program: Path) -> str | None:
    """Return the kernel's messages since the start; None if this user sees none of them."""
    try:
        printed = subprocess.run(
            [program, "--dmesg", "--boot", "--quiet", "--no-pager", "--output=cat"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
            check=False,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return printed.stdout if printed.stdout.strip() else None
