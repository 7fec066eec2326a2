"""The code and the settings of a job, copied when it is submitted.

A job may wait for days and be queued again, while its user works on. It imports the copy of the
project in its folder, and reads the copy of the file of settings there.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from launcher.errors import UsageError
from launcher.recipe.resolve import Reference
from launcher.regular_file import read_regular
from launcher.runs.files import write_atomic
from launcher.runs.freezing import COPY, CodeSnapshot, freeze, survey

_CONFIG = "config.yaml"
"""Name of the copy of the file of settings."""

_MAX_CONFIG_BYTES = 1 << 24


@dataclass(frozen=True, kw_only=True)
class JobCode:
    """What a job imports, and what is copied into its folder for it."""

    words: tuple[str, ...]
    """The recipe and the options of `launcher run` that choose the code."""

    config: Path | None = None
    """The file of settings that the job reads; None reads none."""

    snapshot: CodeSnapshot | None = None
    """The project to copy; None copies none."""

    config_to_copy: Path | None = None
    """The file of settings to copy; None copies none."""

    def copy_to(self, folder: Path) -> None:
        """Copy the project and the file of settings into the folder of the job.

        Raises:
            RunDirError: The copies cannot be written.
            UsageError: The file of settings cannot be read.
        """
        if self.config_to_copy is not None:
            try:
                content = read_regular(self.config_to_copy, _MAX_CONFIG_BYTES)
            except OSError as error:
                raise UsageError(
                    f"Cannot read {self.config_to_copy}: {error.strerror or error}."
                ) from None
            write_atomic(folder / _CONFIG, content)
        if self.snapshot is not None:
            freeze(self.snapshot, folder)


def uncopied_code(reference: Reference, config: Path | None, *options: str) -> JobCode:
    """Return the code of a job that imports the project as it is when the job runs."""
    return JobCode(
        words=(reference.location, *options),
        config=None if config is None else config.resolve(),
    )


def copied_code(reference: Reference, config: Path | None, folder: Path, limit: int) -> JobCode:
    """Return the code of a job that imports a copy, to be made in its folder.

    Args:
        reference: The recipe.
        config: The file of settings; None if there is none.
        folder: The folder of the job.
        limit: Megabytes that the copy may have.

    Raises:
        UsageError: The project is larger.
    """
    snapshot, location = survey(reference, limit), reference.location
    words: tuple[str, ...] = (location,)
    if snapshot is not None:
        copy, project = folder / COPY, f"{snapshot.project.folder}/"
        if location.startswith(project):
            location = str(copy / location.removeprefix(project))
        words = (location, "--code", str(copy))
    return JobCode(
        words=words,
        config=None if config is None else folder / _CONFIG,
        snapshot=snapshot,
        config_to_copy=config,
    )
