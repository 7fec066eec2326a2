"""run.yaml: what a run is, written when it starts or resumes and read by most commands."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import msgspec

from launcher.errors import RunDirError
from launcher.paths import native
from launcher.planning.plan import Plan
from launcher.printable import printable_line, shortened
from launcher.runs.files import remove_file, write_yaml
from launcher.runs.provenance import GitState
from launcher.runs.rundir import RunDir
from launcher.yaml_file import read_yaml_file

_MAX_BYTES = 1 << 24
"""Largest run.yaml that is read; a run that was requeued often keeps all that it was before."""


@dataclass(frozen=True, kw_only=True)
class CodeRecord:
    """The code of a recipe as it was when the run began."""

    project: str
    """The folder of the project: its repository, or the folder of the recipe's file or package."""

    files: Mapping[str, str] = field(default_factory=dict)
    """The recipe's file and those that it imports from the project, each with the first letters of
    its SHA-256."""

    copy: str | None = None
    """The copy of the project that the run imports; None if it imports the project itself.

    run.yaml gives it relative to the run folder."""


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as run.yaml describes it."""

    recipe: str
    """Location of the recipe function, `file.py:name` or `module:name`.

    run.yaml gives a file in the run folder relative to it, as `./recipe.py:name`, so that the
    folder may be moved; `read_run` returns its path."""

    overrides: Mapping[str, Any] = field(default_factory=dict)
    """The values that replaced the recipe's own, by setting or parameter."""

    plan: Mapping[str, Any]
    """The plan as plain values; `read_plan` returns it as a `Plan`."""

    versions: Mapping[str, str] = field(default_factory=dict)
    """Versions of Python and of the packages that the run depends on."""

    code: CodeRecord | None = None
    """The code of the recipe; None for a shipped recipe and for one that is in no file."""

    git: GitState | None = None
    """State of the repository around the recipe; None without a repository or without git."""

    host: str = ""
    """Name of the machine on which the command was typed."""

    folder: str = "."
    """Working directory of the command."""

    command: tuple[str, ...] = ()
    """The command line, without the values of keys and passwords."""

    probe: bool = False
    """Whether this is a measurement by `launcher find`, `profile` or `tune` rather than a run."""

    earlier: tuple[Mapping[str, Any], ...] = ()
    """What run.yaml held before each resumption, the oldest first, as plain values."""

    @property
    def nproc_per_node(self) -> int:
        """Ranks per node of the plan, which plans of every version hold.

        Raises:
            RunDirError: The plan does not hold it.
        """
        value = self.plan.get("nproc_per_node")
        if not isinstance(value, int):
            raise RunDirError(
                f"run.yaml is damaged: plan.nproc_per_node is {value!r}, expected an integer."
            )
        return value

    def read_plan(self) -> Plan:
        """Return the plan.

        Raises:
            RunDirError: It is not a plan of this version of launcher.
        """
        return Plan.from_dict(self.plan)

    def to_dict(self) -> dict[str, Any]:
        """Return the content of run.yaml."""
        values: dict[str, Any] = {
            "recipe": self.recipe,
            "overrides": dict(self.overrides),
            "plan": dict(self.plan),
            "versions": dict(self.versions),
            "code": None if self.code is None else asdict(self.code),
            "git": None if self.git is None else asdict(self.git),
            "host": self.host,
            "folder": self.folder,
            "command": list(self.command),
        }
        if self.probe:
            values["probe"] = True
        if self.earlier:
            values["earlier"] = [dict(record) for record in self.earlier]
        return values


def read_run(run_dir: RunDir) -> RunRecord:
    """Return the content of run.yaml; keys that this version does not know are ignored.

    Raises:
        RunDirError: run.yaml cannot be read, is damaged, or is not from launcher.
    """
    return _convert(_read_values(run_dir), run_dir)


def write_run(run_dir: RunDir, record: RunRecord) -> None:
    """Write run.yaml, completely or not at all.

    Raises:
        RunDirError: It cannot be written.
    """
    write_yaml(run_dir.run_yaml, _values(record, run_dir))


def write_resumption(run_dir: RunDir, record: RunRecord) -> None:
    """Write run.yaml for a resumed run; its present content becomes the last of `earlier`.

    The heartbeats of the ranks that ran before are removed.

    Raises:
        RunDirError: The present content cannot be read, in which case nothing is changed, or the
            new content cannot be written.
    """
    values = _read_values(run_dir)
    _convert(values, run_dir)
    for heartbeat in run_dir.health(0).parent.glob("*.json"):
        remove_file(heartbeat)
    earlier = [*values.pop("earlier", []), values]
    write_yaml(run_dir.run_yaml, {**_values(record, run_dir), "earlier": earlier})


def _values(record: RunRecord, run_dir: RunDir) -> dict[str, Any]:
    """Return the content of run.yaml, which names files of the run folder relative to it."""
    values = record.to_dict()
    values["recipe"] = _relative(record.recipe, record, run_dir)
    if record.code is not None and record.code.copy is not None:
        values["code"]["copy"] = _relative(record.code.copy, record, run_dir)
    return values


def _relative(path: str, record: RunRecord, run_dir: RunDir) -> str:
    """Return a path relative to the run folder, if it is in it or in a copy beside it."""
    own, shared = f"{run_dir.path}/", f"{run_dir.path.parent}/"
    if path.startswith(own):
        return f"./{path.removeprefix(own)}"
    copy = "" if record.code is None else record.code.copy or ""
    if copy.startswith(shared) and path.startswith(copy):
        return f"../{path.removeprefix(shared)}"
    return path


def replace_code(run_dir: RunDir, recipe: str, code: CodeRecord) -> None:
    """Replace the location of the recipe and its code in run.yaml, and nothing else.

    Raises:
        RunDirError: run.yaml cannot be read or written.
    """
    values = _read_values(run_dir)
    changed = replace(_convert(values, run_dir), recipe=recipe, code=code)
    written = _values(changed, run_dir)
    write_yaml(run_dir.run_yaml, {**values, "recipe": written["recipe"], "code": written["code"]})


def replace_plan(run_dir: RunDir, plan: Plan) -> None:
    """Replace the plan in run.yaml, and nothing else.

    Raises:
        RunDirError: run.yaml cannot be read or written.
    """
    values = _read_values(run_dir)
    _convert(values, run_dir)
    write_yaml(run_dir.run_yaml, {**values, "plan": plan.to_dict()})


def _read_values(run_dir: RunDir) -> Any:
    """Return the content of run.yaml as plain values, unchecked."""
    return read_yaml_file(run_dir.run_yaml, max_bytes=_MAX_BYTES, error=RunDirError).value


def _convert(values: Any, run_dir: RunDir) -> RunRecord:
    try:
        record = msgspec.convert(values, RunRecord)
    except (ValueError, OverflowError, msgspec.MsgspecError) as error:
        reason = printable_line(shortened(str(error), 200))
        raise RunDirError(
            f"{run_dir.run_yaml} is damaged, or launcher did not write it: {reason}."
        ) from None
    recipe, code = _absolute(native(record.recipe), run_dir), record.code
    if code is not None:
        copy = None if code.copy is None else _absolute(native(code.copy), run_dir)
        code = replace(code, project=native(code.project), copy=copy)
    return replace(record, recipe=recipe, code=code, folder=native(record.folder))


def _absolute(path: str, run_dir: RunDir) -> str:
    """Return a path of run.yaml that may be relative to the run folder."""
    if not path.startswith(("./", "../")):
        return path
    return os.path.normpath(run_dir.path / path)
