"""Where a run came from: package versions, the state of the code in git, the command line."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from launcher.printable import as_unicode
from launcher.runs.redaction import redacted

_PACKAGES = ("gpu-launcher", "torch", "accelerate", "deepspeed", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True)
class GitState:
    """State of a git repository."""

    commit: str
    """Full hash of the commit that is checked out."""

    branch: str
    """Name of the branch; `HEAD` if none is checked out."""

    changed_files: int
    """Files that differ from the commit, untracked ones included."""


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that a run depends on."""
    from importlib import metadata

    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            installed[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return installed


def git_state(folder: Path) -> GitState | None:
    """Return the state of the repository that holds `folder`.

    None if there is no repository, or git is not installed or fails.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        ).stdout.strip()

    try:
        return GitState(
            commit=git("rev-parse", "HEAD"),
            branch=git("rev-parse", "--abbrev-ref", "HEAD"),
            changed_files=len(git("status", "--porcelain").splitlines()),
        )
    except (OSError, subprocess.SubprocessError):
        return None


def command_line() -> list[str]:
    """Return the command line of this process, without the values of keys and passwords."""
    return [redacted(as_unicode(argument)) for argument in sys.orig_argv]
