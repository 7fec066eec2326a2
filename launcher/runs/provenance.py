"""Where a run came from: versions of what it used, and the state of the code in git."""

from __future__ import annotations

import platform
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

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

    found = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_state(folder: Path) -> GitState | None:
    """Return the commit of the repository around `folder`, and whether files differ from it.

    None where there is no repository or no git.
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
    """Return the arguments that this process was started with, less what is secret."""
    return [redacted(each) for each in sys.orig_argv]
