"""Freeze the project of a recipe: copy its code into a run folder, from which the run imports it.

In a git repository these are the tracked files as they are in the working tree, and the untracked
ones that git does not ignore. The copy has links to what git ignores, such as data, so that recipes
find it beside their file. Without git it is the folder of the recipe's file or package.

    code/        the copy
    code.json    where it came from; see `FrozenProject`
    code.diff    what differed from the commit, as text
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path

from launcher.errors import RunDirError, UsageError
from launcher.json_file import read_json
from launcher.paths import is_dir
from launcher.printable import printable_line
from launcher.quantities import size
from launcher.recipe.frozen_code import FrozenCode
from launcher.recipe.project_code import Project, changed_files, digests_of, project_of
from launcher.recipe.resolve import Reference
from launcher.runs.files import unwritable_error, write_atomic, write_json
from launcher.runs.provenance import GitState, git_state
from launcher.runs.redaction import redacted

COPY = "code"
"""Name of the folder of the first copy."""

DEFAULT_LIMIT = 100
"""Megabytes that a copy has at most, unless the user asks for more."""

_MAX_FILES = 100_000
"""Files that a copy has at most; a folder with more is a home folder or holds data."""

_MAX_DIFF_BYTES = 1 << 20
_MAX_JSON_BYTES = 1 << 24
_GIT_SECONDS = 60.0
_NUM_NAMED = 5

_OF_RUNS = {"run.yaml", "submission.json", "job.sbatch", "sweep.json"}
"""Files by which the folder of a run, of an array or of a sweep is known; none is copied."""


@dataclass(frozen=True, kw_only=True)
class CodeSnapshot:
    """What the copy of a project will have."""

    project: Project
    files: tuple[str, ...]
    """The files and links to copy, relative to the project's folder."""

    ignored: tuple[str, ...] = ()
    """What git ignores and the copy has links to."""

    num_bytes: int
    digests: Mapping[str, str]
    """Digests of the recipe's own files at the time at which it was planned."""


@dataclass(frozen=True, kw_only=True)
class FrozenProject:
    """The content of code.json."""

    project: str
    """The folder that was copied."""

    git: GitState | None = None
    """State of its repository; None without one."""

    num_files: int = 0
    num_bytes: int = 0
    ignored: tuple[str, ...] = field(default=())
    """What git ignored, to which the copy has links."""


def survey(reference: Reference, limit: int = DEFAULT_LIMIT) -> CodeSnapshot | None:
    """Return what a copy of a recipe's project would have; None if there is nothing to copy.

    Args:
        reference: The recipe.
        limit: Megabytes that the copy may have.

    Raises:
        UsageError: The project is larger.
    """
    project = project_of(reference)
    if project is None or reference.code is not None:
        return None
    listed = _list_repository(project.folder) if project.is_repository else None
    files, ignored = listed or (list(itertools.islice(_walk(project), _MAX_FILES + 2)), [])
    runs = _RunFolders(project.folder)
    digests = digests_of(project)
    if not listed:
        files += digests  # what a package imports from beside it
    sizes = dict(_sizes(project.folder, (name for name in files if name not in runs)))
    if len(sizes) > _MAX_FILES or sum(sizes.values()) > limit * 10**6:
        raise _too_large(project, sizes, limit)
    return CodeSnapshot(
        project=project,
        files=tuple(sizes),
        ignored=tuple(name for name in ignored if _is_linked(project.folder / name, runs, name)),
        num_bytes=sum(sizes.values()),
        digests=digests,
    )


def freeze(snapshot: CodeSnapshot, folder: Path) -> FrozenCode:
    """Copy a project to the folder `code` in `folder`, with code.json and code.diff beside it.

    Raises:
        RunDirError: The copy cannot be written, or a file of the recipe was changed meanwhile.
    """
    project = snapshot.project
    copy = _unused(folder.resolve())
    for name in snapshot.files:
        _copy(project.folder, name, copy)
    for name in snapshot.ignored:
        with contextlib.suppress(FileExistsError):
            _make_link(copy / name, str(project.folder / name))
    if changed := changed_files(copy, snapshot.digests):
        raise RunDirError(
            f"{project.folder / changed[0]} was changed while it was copied, after the run was "
            "planned. Repeat the command."
        )
    state = git_state(project.folder) if project.is_repository else None
    frozen = FrozenProject(
        project=str(project.folder),
        git=state,
        num_files=len(snapshot.files),
        num_bytes=snapshot.num_bytes,
        ignored=snapshot.ignored,
    )
    write_json(_beside(copy, "json"), asdict(frozen))
    if state is not None and (text := _diff(project.folder)):
        write_atomic(_beside(copy, "diff"), text)
    return FrozenCode(project=project.folder, copy=copy)


def open_frozen(copy: Path) -> FrozenCode:
    """Return the copy of a project in a folder that `freeze` made.

    Raises:
        RunDirError: The folder or its code.json is missing or damaged.
    """
    copy = copy.resolve()
    return FrozenCode(project=Path(read_frozen(copy).project), copy=copy)


def read_frozen(copy: Path) -> FrozenProject:
    """Return where the copy of a project came from.

    Raises:
        RunDirError: The folder or its code.json is missing or damaged.
    """
    if not is_dir(copy):
        raise RunDirError(
            f"{copy}, the copy of the recipe's code that the run was planned with, does not exist. "
            "Bring it back, or resume with the project's present code: --allow-code-change."
        )
    return read_json(_beside(copy, "json"), FrozenProject, max_bytes=_MAX_JSON_BYTES)


def place_of(reference: Reference, code: FrozenCode) -> str:
    """Return the location of a recipe in a copy of its project."""
    name, _, function = reference.location.rpartition(":")
    return (
        f"{code.place(Path(name))}:{function}" if Path(name).is_absolute() else f"{name}:{function}"
    )


def _unused(folder: Path) -> Path:
    """Make and return the folder code, or code-2 and so on if there is one already.

    Raises:
        RunDirError: It cannot be made.
    """
    for number in range(1, 1000):
        copy = folder / (COPY if number == 1 else f"{COPY}-{number}")
        try:
            copy.mkdir()
        except FileExistsError:
            continue
        except OSError as error:
            raise unwritable_error(copy, error) from None
        return copy
    raise RunDirError(f"{folder} has 999 copies of its code. Remove those that no run needs.")


def _beside(copy: Path, suffix: str) -> Path:
    return copy.with_name(f"{copy.name}.{suffix}")


def _list_repository(folder: Path, prefix: str = "") -> tuple[list[str], list[str]] | None:
    """Return the files of a repository and what it ignores; None if git does not tell.

    Submodules, and repositories that lie in it, are listed as well.
    """
    of_all = _git(folder, "ls-files", "-z", "--cached", "--others", "--exclude-standard")
    of_ignored = _git(
        folder, "ls-files", "-z", "--others", "--ignored", "--exclude-standard", "--directory"
    )
    if of_all is None or of_ignored is None:
        return None
    files: list[str] = []
    ignored = [prefix + name.rstrip("/") for name in of_ignored]
    for name in dict.fromkeys(of_all):
        path = folder / name
        if not path.is_symlink() and is_dir(path):
            if inner := _list_repository(path, f"{prefix}{name.rstrip('/')}/"):
                files += inner[0]
                ignored += inner[1]
        else:
            files.append(prefix + name)
    return files, ignored


def _git(folder: Path, *arguments: str) -> list[str] | None:
    """Return the names that a command of git prints; None if it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_GIT_SECONDS,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return [os.fsdecode(name) for name in done.stdout.split(b"\0") if name]


def _walk(project: Project) -> Iterator[str]:
    """Yield the files of a project without git, except hidden ones and those of environments."""
    top = project.folder if project.package is None else project.folder / project.package
    for path, folders, files in os.walk(top, followlinks=False):
        here = Path(path)
        if "pyvenv.cfg" in files or _OF_RUNS & set(files):
            folders.clear()
            continue
        links = [name for name in folders if (here / name).is_symlink()]
        folders[:] = sorted(name for name in folders if not _is_hidden(name) and name not in links)
        for name in sorted((*files, *links)):
            if not _is_hidden(name):
                yield str((here / name).relative_to(project.folder))


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__pycache__"


class _RunFolders:
    """Tells which files of a project are in the folder of a run, by their names."""

    def __init__(self, project: Path) -> None:
        self._project = project
        self._known: dict[str, bool] = {"": False}

    def __contains__(self, name: str) -> bool:
        folder = name.rpartition("/")[0]
        if folder not in self._known:
            path = self._project / folder
            is_one = any(os.path.lexists(path / each) for each in _OF_RUNS)
            self._known[folder] = is_one or folder in self
        return self._known[folder]

    def holds(self, folder: Path) -> bool:
        """Return whether a folder is that of a run, or holds some."""
        with contextlib.suppress(OSError):
            names = {entry.name for entry in folder.iterdir()}
            return bool(names & _OF_RUNS) or any(
                os.path.lexists(folder / name / each) for name in names for each in _OF_RUNS
            )
        return False


def _is_linked(path: Path, runs: _RunFolders, name: str) -> bool:
    """Return whether the copy has a link to something that git ignores.

    Hidden files, caches, environments and the folders of runs have none.
    """
    if any(map(_is_hidden, Path(name).parts)) or path.suffix in (".pyc", ".pyo") or name in runs:
        return False
    return not (is_dir(path) and (os.path.lexists(path / "pyvenv.cfg") or runs.holds(path)))


def _sizes(folder: Path, names: Iterator[str]) -> Iterator[tuple[str, int]]:
    """Yield the regular files and links among some names, with their sizes."""
    for number, name in enumerate(names):
        try:
            status = os.lstat(folder / name)
        except OSError:  # a tracked file that was deleted
            continue
        if stat.S_ISREG(status.st_mode) or stat.S_ISLNK(status.st_mode):
            yield name, status.st_size
        if number > _MAX_FILES:
            return


def _copy(folder: Path, name: str, copy: Path) -> None:
    """Copy a file or a link of a project; the copy of a file is executable if the file is.

    A link within the project leads to the same file of the copy. One that leads out of it leads
    to the same place as before, and what is there is not copied.

    Raises:
        RunDirError: It cannot be written, or the file cannot be read.
    """
    source, target = folder / name, copy / name
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        if source.is_symlink():
            _make_link(target, _target_of_link(source, folder, copy))
            return
        shutil.copyfile(source, target, follow_symlinks=False)
        if source.stat().st_mode & stat.S_IXUSR:
            target.chmod(target.stat().st_mode | stat.S_IXUSR)
    except FileNotFoundError:  # removed since it was listed
        return
    except (OSError, shutil.Error) as error:
        if getattr(error, "filename", None) == str(source):
            reason = getattr(error, "strerror", None) or error
            raise RunDirError(f"Cannot read {source}: {reason}.") from None
        raise unwritable_error(target, OSError(*error.args)) from None


def _target_of_link(link: Path, folder: Path, copy: Path) -> str:
    """Return where the copy of a link leads."""
    written = link.readlink()
    leads_to = Path(os.path.normpath(link.parent / written))
    if not leads_to.is_relative_to(folder):
        return str(leads_to)
    return str(copy / leads_to.relative_to(folder)) if written.is_absolute() else str(written)


def _make_link(link: Path, target: str) -> None:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)


def _diff(folder: Path) -> str:
    """Return what differs from the commit, without keys and passwords; the start of a long text."""
    command = ["git", "-C", str(folder), "diff", "--no-ext-diff", "--no-textconv", "--no-color"]
    try:
        with subprocess.Popen(
            [*command, "HEAD"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        ) as process:
            assert process.stdout is not None
            content = process.stdout.read(_MAX_DIFF_BYTES + 1)
            process.kill()
    except OSError:
        return ""
    text = redacted(content[:_MAX_DIFF_BYTES].decode("utf-8", "replace"))
    if len(content) > _MAX_DIFF_BYTES:
        text += f"\n[the rest is left out: a code.diff has at most {size(_MAX_DIFF_BYTES)}]\n"
    return text


def _too_large(project: Project, sizes: Mapping[str, int], limit: int) -> UsageError:
    largest = sorted(sizes, key=lambda name: -sizes[name])[:_NUM_NAMED]
    listed = ", ".join(f"{printable_line(name)} ({_megabytes(sizes[name])})" for name in largest)
    total = sum(sizes.values())
    number = f"more than {_MAX_FILES:,}" if len(sizes) > _MAX_FILES else f"{len(sizes):,}"
    remedy = (
        "Add data to .gitignore: what git ignores is not copied"
        if project.is_repository
        else "Keep data out of this folder, or make it a git repository whose .gitignore names the "
        "data"
    )
    return UsageError(
        f"The code of a run is copied into its folder, and {project.folder} has "
        f"{_megabytes(total)} in {number} files to copy; the limit is {limit:,} MB. The largest: "
        f"{listed}. {remedy}. Or raise the limit with --code-limit, or let the run import the "
        "project's files as they will be then with --no-freeze."
    )


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 10**6:,.1f} MB"
