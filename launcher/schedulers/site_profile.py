"""Site profiles: YAML files with what is true of a cluster, read into the dataclass of a scheduler.

This module also reads times, which all profiles and `launcher submit --time` write as Slurm does.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

from msgspec import Meta

from launcher.errors import SchedulerError, did_you_mean
from launcher.paths import exists, is_dir
from launcher.recipe.overrides import read_yaml
from launcher.recipe.validation import MismatchError, brief, convert

T = TypeVar("T")

Line = Annotated[str, Meta(pattern=r"^[^\n\r\0]*$", description="text of one line")]
"""Text of one line, as a batch script can hold it."""


def find_profile(
    name: str, folder: str, home_folder: str, env: Mapping[str, str], error: type[SchedulerError]
) -> Path:
    """Return the file of a site profile.

    Args:
        name: A YAML file, or the name of one in the folders.
        folder: The folder of profiles below the working folder.
        home_folder: The folder of profiles below the user's folder of configuration files.
        env: The environment.
        error: The class of the error.

    Raises:
        SchedulerError: There is no such profile.
    """
    home = Path(env.get("XDG_CONFIG_HOME") or Path(env.get("HOME", "/")) / ".config")
    folders = (Path(folder), home / home_folder)
    paths = [Path(name), *(each / f"{name}.yaml" for each in folders)]
    profile = next((path for path in paths if exists(path) and not is_dir(path)), None)
    if profile is None:
        profiles = sorted({path.stem for each in folders for path in each.glob("*.yaml")})
        raise error(
            f"--cluster {name}: there is no such site profile."
            + did_you_mean(name, profiles)
            + f" Looked for {', '.join(map(str, paths))}."
        )
    return profile


def read_profile(path: Path, kind: type[T], error: type[SchedulerError]) -> T:
    """Read a site profile from a YAML file.

    Args:
        path: The file.
        kind: The dataclass of the profile, whose fields are the keys.
        error: The class of the error.

    Raises:
        SchedulerError: A key is unknown or missing, or a value does not fit.
    """
    hints = get_type_hints(kind, include_extras=True)
    names = [item.name for item in fields(kind)]  # type: ignore[arg-type]  # a dataclass
    values: dict[str, Any] = {}
    for entry in read_yaml(path, as_text=True):
        if entry.name not in names:
            raise error(
                f"{entry.source}: unknown key {entry.name!r} in the site profile."
                + did_you_mean(entry.name, names)
                + f" The keys are {', '.join(names)}."
            )
        try:
            values[entry.name] = convert(entry.value, hints[entry.name], "text")
        except MismatchError as mismatch:
            raise error(f"{entry.source}: {entry.name}: {mismatch}.") from None
    try:
        return kind(**values)
    except TypeError:
        missing = [name for name in names if name not in values and not hasattr(kind, name)]
        raise error(f"{path}: the site profile needs {', '.join(missing[:1])}.") from None


def check_environment(names: Mapping[str, str], path: Path, error: type[SchedulerError]) -> None:
    """Refuse environment variables with names that a shell cannot have.

    Raises:
        SchedulerError: There is one.
    """
    for name in names:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise error(f"{path}: env: {name!r} is not a valid name of an environment variable.")


def read_time(text: str, what: str, error: type[SchedulerError] = SchedulerError) -> int:
    """Return the seconds of a time in Slurm's notation: minutes, h:mm:ss, d-h or d-hh:mm:ss.

    Args:
        text: The time.
        what: What the time is for, in the error.
        error: The class of the error.

    Raises:
        SchedulerError: The text is not a time.
    """
    match = re.fullmatch(
        r"(?:([0-9]{1,6})-)?([0-9]{1,9})(?::([0-9]{1,9}))?(?::([0-9]{1,9}))?", text
    )
    if match is None:
        raise error(
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
