"""Import a recipe from a copy of its project instead of from the project itself.

The copy stands in for the project in sys.path, and modules that came from the project are imported
again. Processes that are started later inherit both. The working folder stays what it is, so that
relative paths of data mean the same.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from launcher import paths

_OWN_PACKAGE = __name__.partition(".")[0]
_MAIN = ("__main__", "__mp_main__")
_LIBRARY = f"{Path(contextlib.__file__).parent}/"
"""Where the modules of Python itself are."""


@dataclass(frozen=True, kw_only=True)
class FrozenCode:
    """A copy of a project."""

    project: Path
    """The folder that was copied."""

    copy: Path
    """The folder of the copy."""

    def place(self, path: Path) -> Path:
        """Return what the copy has in the place of a file or folder of the project.

        The path is returned unchanged if the copy has no file or folder of its own there.
        """
        if not path.is_absolute() or not path.is_relative_to(self.project):
            return path
        placed = self.copy / path.relative_to(self.project)
        is_own = paths.exists(placed) and placed.resolve().is_relative_to(self.copy.resolve())
        return placed if is_own else path

    def original(self, path: Path) -> Path:
        """Return the file of the project that a file of the copy stands for, or `path` itself."""
        if not path.is_relative_to(self.copy):
            return path
        return self.project / path.relative_to(self.copy)


@dataclass(frozen=True, kw_only=True)
class _Switch:
    """What `import_from` has changed in this process."""

    code: FrozenCode
    path: list[str]
    """sys.path before."""

    modules: dict[str, ModuleType]
    """The modules of the project that were forgotten, by name."""


_switches: list[_Switch] = []
"""The calls of `import_from` in this process that have not been undone."""


def import_from(code: FrozenCode) -> None:
    """Import from a copy of a project from now on; modules of the project are imported again."""
    modules = {name: sys.modules[name] for name in _modules_in(code.project, code)}
    _switches.append(_Switch(code=code, path=list(sys.path), modules=modules))
    sys.path[:] = dict.fromkeys([*map(functools.partial(_entry, code), sys.path), *_editable(code)])
    for name in modules:
        del sys.modules[name]
    importlib.invalidate_caches()


@contextlib.contextmanager
def restored_imports() -> Iterator[None]:
    """Undo at the end of the context what `import_from` changes in it."""
    count = len(_switches)
    try:
        yield
    finally:
        while len(_switches) > count:
            switch = _switches.pop()
            for name in _modules_in(switch.code.copy):
                del sys.modules[name]
            sys.modules.update(switch.modules)
            sys.path[:] = switch.path
            importlib.invalidate_caches()


def _entry(code: FrozenCode, entry: str) -> str:
    """Return what takes the place of an entry of sys.path."""
    folder = Path(entry).resolve()  # an empty entry is the working folder
    placed = code.place(folder)
    return entry if placed == folder else str(placed)


def _modules_in(folder: Path, code: FrozenCode | None = None) -> list[str]:
    """Return the names of the imported modules that are in a folder, but not of installed ones.

    Args:
        folder: The folder.
        code: Only modules count that this copy has in the place of those of the project.
    """
    names = []
    for name, module in list(sys.modules.items()):
        if name in _MAIN or name.partition(".")[0] == _OWN_PACKAGE:
            continue
        for place in _places_of(module):
            if place.startswith(_LIBRARY) or not Path(place).is_absolute():
                continue
            path = Path(place).resolve()
            if path.is_relative_to(folder) and (code is None or code.place(path) != path):
                names.append(name)
                break
    return names


def _places_of(module: ModuleType) -> list[str]:
    """Return the file of a module, or the folders of a package that has no file."""
    file = getattr(module, "__file__", None)
    if isinstance(file, str):
        return [file]
    try:
        return [str(folder) for folder in getattr(module, "__path__", ())]
    except Exception:  # noqa: BLE001  # a module may be any object
        return []


def _editable(code: FrozenCode) -> Iterator[str]:
    """Yield the folders in the copy of packages that are installed with `pip install --editable`.

    setuptools maps the names of such packages to folders, without adding them to sys.path.
    """
    for name, module in list(sys.modules.items()):
        mapping = getattr(module, "MAPPING", None) if name.startswith("__editable__") else None
        if not isinstance(mapping, dict):
            continue
        for package, folder in mapping.items():
            original = Path(str(folder)).resolve()
            placed = code.place(original)
            if package != _OWN_PACKAGE and placed != original and placed.name == package:
                yield str(placed.parent)
