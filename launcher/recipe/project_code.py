"""The project of a recipe: its folder, and which of its files the recipe imports.

The files are found by reading import statements, those inside functions included, because recipes
import their models where they build them. Nothing is imported for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from launcher import paths
from launcher.recipe.resolve import BUNDLED, Reference
from launcher.regular_file import read_regular

_MAX_FILES = 500
"""Files of a project that are followed from import to import."""

_MAX_BYTES = 4 * 2**20
"""Size of the largest file whose imports are read."""

_OWN_FOLDER = str(Path(__file__).resolve().parents[1])
"""The folder of this package, which is no part of a project that has it in its repository."""

_DIGEST_LETTERS = 16
"""Letters of a file's SHA-256 that are kept."""

_INSTALLED = {"site-packages", "dist-packages"}
"""Folders of installed packages, which are no part of a project."""

_IMPORT = re.compile(
    rb"^[ \t]*(?:from[ \t]+([.\w]+)[ \t]+import[ \t]*(\([^)]*\)|[^\n]*)|import[ \t]+([^\n]*))",
    re.MULTILINE,
)
_NAME = re.compile(rb"[^\W\d][\w.]*")


@dataclass(frozen=True, kw_only=True)
class Project:
    """The folder of a recipe's code."""

    folder: Path
    """The repository that holds the recipe; without one the folder of its file or package."""

    file: Path
    """The file of the recipe."""

    import_folder: Path
    """The folder that the recipe's file or package is imported from."""

    package: str | None = None
    """The package below `folder` that is the project; None if all of `folder` is."""

    is_repository: bool = False
    """Whether `folder` is the top of a git repository."""


def project_of(reference: Reference) -> Project | None:
    """Return the project of a recipe.

    It is None for the recipes that this package ships, for a function that is in no file, and for
    installed packages.
    """
    name = reference.location.rpartition(":")[0]
    is_file = Path(name).is_absolute()
    found = name if is_file else getattr(sys.modules.get(name), "__file__", None)
    if reference.folder is not None or found is None:
        return None
    file = Path(found).resolve()
    if file.parent == BUNDLED or _INSTALLED & set(file.parts) or not paths.is_file(file):
        return None
    import_folder = _package_parent(file) if is_file else _module_parent(file, name)
    if reference.code is not None:
        return Project(folder=reference.code.copy, file=file, import_folder=import_folder)
    for folder in file.parents:
        if paths.exists(folder / ".git"):
            return Project(
                folder=folder, file=file, import_folder=import_folder, is_repository=True
            )
    package = file.relative_to(import_folder).parts[0] if import_folder != file.parent else None
    return Project(folder=import_folder, file=file, import_folder=import_folder, package=package)


def digests_of(project: Project) -> dict[str, str]:
    """Return the digests of the recipe's file and of the project's files that it imports.

    They have the paths relative to the project's folder as keys, sorted.
    """
    folders = [project.file.parent, project.import_folder]
    for entry in sys.path:
        folder = Path(entry).resolve()  # an empty entry is the working folder
        if folder.is_relative_to(project.folder) and not _INSTALLED & set(folder.parts):
            folders.append(folder)
    search = _Search(project.folder, tuple(dict.fromkeys(folders)))
    digests: dict[str, str] = {}
    waiting = [str(project.file), *map(str, search.packages_of(project.file))]
    seen = set(waiting)
    for file in waiting:  # which grows
        try:
            content = read_regular(Path(file), _MAX_BYTES)
        except OSError:
            continue
        digests[file.removeprefix(f"{project.folder}/")] = _digest(content)
        if len(digests) == _MAX_FILES:
            break
        found = set(search.imports_of(file, content)) - seen
        seen |= found
        waiting += sorted(found)
    return dict(sorted(digests.items()))


def changed_files(folder: Path, digests: Mapping[str, str]) -> list[str]:
    """Return the names of the files below `folder` that do not have these digests any more."""
    return [name for name, digest in digests.items() if _digest_of(folder / name) != digest]


def _digest_of(file: Path) -> str | None:
    try:
        return _digest(read_regular(file, _MAX_BYTES))
    except OSError:
        return None


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:_DIGEST_LETTERS]


def _package_parent(file: Path) -> Path:
    """Return the folder that holds a file, or the outermost package that it belongs to."""
    folder = file.parent
    while paths.is_file(folder / "__init__.py"):
        folder = folder.parent
    return folder


def _module_parent(file: Path, name: str) -> Path:
    """Return the folder from which a module is imported by its dotted name."""
    return file.parents[name.count(".") + (file.name == "__init__.py")]


class _Search:
    """Finds the files of a project that import statements name.

    Args:
        root: The folder of the project; nothing outside it is found, nor this package in it.
        folders: The folders from which modules are imported, in their order.
    """

    def __init__(self, root: Path, folders: Sequence[Path]) -> None:
        self._root, self._folders = f"{root}/", tuple(map(str, folders))
        self._listed: dict[str, dict[str, bool]] = {_OWN_FOLDER: {}}
        """The names in each folder that has been looked at, and whether they are folders."""

        self._found: dict[tuple[tuple[str, ...], str], tuple[str, ...]] = {}
        """The files of the modules that were looked for, by their folders and dotted names."""

    def packages_of(self, file: Path) -> Iterator[Path]:
        """Yield the `__init__.py` of each package of the project that holds a file."""
        for folder in file.parents:
            if "__init__.py" not in self._names(str(folder)):
                return
            yield folder / "__init__.py"

    def imports_of(self, file: str, content: bytes) -> Iterator[str]:
        """Yield the files of the project that the import statements of a file may name."""
        for match in _IMPORT.finditer(content):
            source, names, modules = match.groups()
            if source is None:
                for module in _names_in(modules):
                    yield from self._find(self._folders, module)
                continue
            dotted = source.decode("utf-8", "replace")
            stem, folders = dotted.lstrip("."), self._folders
            if level := len(dotted) - len(stem):
                folders = (file.rsplit("/", level)[0],)
            for name in _names_in(names) if stem else ():
                yield from self._find(folders, f"{stem}.{name}")
            for name in () if stem else _names_in(names):
                yield from self._find(folders, name)

    def _find(self, folders: tuple[str, ...], name: str) -> tuple[str, ...]:
        """Return the files of a module, and of its packages, by its dotted name.

        The last part of the name may be a name within a module.
        """
        key = folders, name
        if key not in self._found:
            self._found[key] = tuple(self._look(folders, name))
        return self._found[key]

    def _look(self, folders: tuple[str, ...], name: str) -> Iterator[str]:
        first, _, rest = name.partition(".")
        for folder in folders:
            names = self._names(folder)
            if names.get(first):
                package = f"{folder}/{first}"
                if "__init__.py" in self._names(package):
                    yield f"{package}/__init__.py"
                if rest:
                    yield from self._find((package,), rest)
                return
            if f"{first}.py" in names:
                yield f"{folder}/{first}.py"
                return

    def _names(self, folder: str) -> dict[str, bool]:
        if folder not in self._listed:
            self._listed[folder] = {}
            if f"{folder}/".startswith(self._root):
                with contextlib.suppress(OSError), os.scandir(folder) as entries:
                    self._listed[folder] = {
                        entry.name: paths.leads_to_dir(entry) for entry in entries
                    }
        return self._listed[folder]


def _names_in(text: bytes) -> Iterator[str]:
    """Yield the names in a list such as `a.b as c, d`, without those after `as`."""
    for part in text.partition(b"#")[0].strip(b"() \t").split(b","):
        if match := _NAME.search(part):
            yield match[0].decode("utf-8", "replace")
