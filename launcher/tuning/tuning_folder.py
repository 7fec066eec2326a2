"""The folder of a tuning, which stores the result of each search as `<name>.json`.

A tuning that is stopped continues in the same folder: searches whose results are stored there do
not run again. `asked.json` holds the arguments of the tuning, so that a folder is never continued
with others.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from launcher.errors import RunDirError
from launcher.json_file import exact_floats, find_json, read_json
from launcher.paths import exists
from launcher.planning.plan import Plan
from launcher.runs.files import write_json
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.probe_run import Target

_ARGUMENTS_FILE = "asked.json"

T = TypeVar("T")


def open_tuning(
    out: Path | None,
    target: Target,
    plan: Plan,
    *,
    memory: int | None,
    steps: int,
    seconds: float,
) -> RunDir:
    """Create the folder of a tuning, or open that of a tuning with the same arguments.

    Args:
        out: The folder; None creates one whose name has the recipe and the time.
        target: The recipe to tune.
        plan: Its plan before tuning.
        memory: The argument of `Tuner`.
        steps: The argument of `Tuner`.
        seconds: The argument of `Tuner`.

    Raises:
        RunDirError: The folder belongs to something else, has other arguments, or cannot be made.
    """
    arguments = {
        "recipe": target.reference.location,
        "overrides": [[override.name, str(override.value)] for override in target.overrides],
        "ranks": [plan.device, plan.nodes, plan.nproc_per_node],
        "memory": memory,
        "steps": steps,
        "seconds": seconds,
    }
    if out is None or not exists(out / _ARGUMENTS_FILE):
        run_dir = create_run_dir(out, f"tune-{plan.recipe}")
        write_json(run_dir.path / _ARGUMENTS_FILE, arguments)
        return run_dir
    file = out / _ARGUMENTS_FILE
    remedy = "The tuning cannot continue: give another --out."
    stored = read_json(file, dict[str, Any], remedy=remedy)
    for name, value in arguments.items():
        if stored.get(name) != value:
            raise RunDirError(
                f"{out} holds a tuning with {name}={stored.get(name)}, but this command has "
                f"{name}={value}. Give another --out, or repeat the command that started it."
            )
    return RunDir(out.resolve())


def read_result(run_dir: RunDir, name: str, kind: type[T]) -> T | None:
    """Return the stored result of a search, or None if there is none.

    Args:
        run_dir: Folder of the tuning.
        name: Name of the search.
        kind: Dataclass of the result.

    Raises:
        RunDirError: The stored result is damaged.
    """
    file = run_dir.path / f"{name}.json"
    return find_json(file, kind, remedy="Remove it to measure it again.", exact=True)


def store_result(run_dir: RunDir, name: str, search: Callable[[RunDir], T]) -> T:
    """Run a search in a new folder below that of the tuning, store its result and return it.

    Args:
        run_dir: Folder of the tuning.
        name: Name of the search and of its folder.
        search: Returns a dataclass, given the folder of the search.
    """
    search_dir = run_dir.path / name
    shutil.rmtree(search_dir, ignore_errors=True)  # a search that was stopped starts again
    result = search(create_run_dir(search_dir, name))
    values = exact_floats(asdict(result))  # type: ignore[call-overload]
    write_json(run_dir.path / f"{name}.json", values)
    return result
