"""From what a user types to the function that makes the recipe.

    digits                      ./recipes/digits.py, or the recipe of that name that we ship
    recipes/digits.py           a file; its function `digits`, or the only one that returns a Recipe
    recipes/digits.py:wide      that function
    my_project.recipes:wide     a module, found as `python -m` would from this folder
    launcher.recipes.digits     a recipe that we ship, under the name that Python imports it by

Files are loaded by their path: another installed package that happens to be called `recipes`
cannot take their place.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import TypeVar

from launcher.errors import LauncherError, RecipeError, did_you_mean
from launcher.forking import observed_threads
from launcher.recipe.recipe import Recipe

T = TypeVar("T")

BUNDLED = (Path(__file__).parents[1] / "recipes").resolve()
"""The folder of the recipes that this package ships; in a clone, a link leads there."""

_PACKAGE = "launcher.recipes"
"""What Python imports them by."""

_ONCE_BUNDLED = Path(__file__).resolve().parents[2] / "recipes"
"""Where they were installed once, as run.yaml of a run from that time says."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A recipe function and where it is."""

    location: str
    """Absolute `file:function`, or `module:function`: resolves to the same in another process."""

    function: Callable[..., Recipe]

    @property
    def shown(self) -> str:
        """`location`, relative to this folder where it lies below it."""
        return self.location.removeprefix(f"{Path.cwd()}{os.sep}")


@dataclass(frozen=True, kw_only=True)
class ListedRecipe:
    """A recipe function found in a file without importing it."""

    path: Path
    function: str
    sentence: str
    """The first line of its docstring."""


def resolve(text: str) -> Reference:
    """Find and import the recipe function that `text` names.

    Raises:
        RecipeError: Nothing is there, the import fails, or no function returns a Recipe.
    """
    target, _, function = text.partition(":") if ":" in text else (text, "", "")
    path = _file(target)
    if path is not None:
        module, place = _load(path), str(path)
    elif target.endswith(".py") or os.sep in target:
        raise RecipeError(f"There is no file {target!r}.{_nearby(Path(target))}")
    else:
        module, place = _import(target), target
    return _reference(module, place, function)


def reference_of(function: Callable[..., Recipe]) -> Reference:
    """Return the reference of a function that is at hand, such as the one given to `main`."""
    try:
        place = str(Path(inspect.getsourcefile(function) or "").resolve())
    except TypeError:
        place = getattr(function, "__module__", "?")
    return Reference(location=f"{place}:{function.__name__}", function=function)


def known_recipes() -> dict[str, str]:
    """Return the sentence of each recipe in ./recipes and of those that come along, by name."""
    here = Path("recipes").resolve()
    folders = [here, BUNDLED] if here != BUNDLED and here.is_dir() else [BUNDLED]
    names: dict[str, str] = {}
    for folder in folders:
        for found in list_recipes(folder):
            stem = found.path.stem
            name = stem if found.function == stem else f"{stem}:{found.function}"
            names.setdefault(name, found.sentence)
    return names


def list_recipes(folder: Path) -> Iterator[ListedRecipe]:
    """Find the functions annotated `-> Recipe` in the files of `folder`, importing nothing."""
    for path in sorted(folder.glob("*.py")):
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (OSError, SyntaxError, UnicodeDecodeError, ValueError):
            continue
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                returns = ast.unparse(node.returns) if node.returns else ""
                if returns.strip("'\"").split(".")[-1] == "Recipe":
                    sentence = (ast.get_docstring(node) or "").partition("\n")[0]
                    yield ListedRecipe(path=path, function=node.name, sentence=sentence)


def _file(target: str) -> Path | None:
    """Return the file that `target` names, as a path or as a recipe's name."""
    if target.endswith(".py") or os.sep in target:
        candidates = [Path(target), Path(f"{target}.py")]
        if Path(target).parent == _ONCE_BUNDLED:
            candidates.append(BUNDLED / Path(target).name)
    elif target.startswith(f"{_PACKAGE}."):
        candidates = [BUNDLED / f"{target.removeprefix(f'{_PACKAGE}.')}.py"]
    else:
        package, dot, name = target.rpartition(".")
        if package not in ("", "recipes") or not name.isidentifier():
            return None
        folders = [Path("recipes")] if dot else [Path("recipes"), BUNDLED]
        candidates = [folder / f"{name}.py" for folder in folders]
    return next((path.resolve() for path in candidates if path.is_file()), None)


def _load(path: Path) -> ModuleType:
    """Import the file at `path`, as a module of the package that it lies in, if any."""
    if path.parent == BUNDLED:
        module = _guarded(lambda: importlib.import_module(f"{_PACKAGE}.{path.stem}"), str(path))
        assert module is not None
        return module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    files, names, folder = [path], [path.stem], path.parent
    while (folder / "__init__.py").is_file():
        files.insert(0, folder / "__init__.py")
        names.insert(0, folder.name)
        folder = folder.parent
    for depth, file in enumerate(files, start=1):
        name = ".".join(names[:depth])
        if name not in sys.modules:
            _execute(name, file)
        elif not _is_from(sys.modules[name], file):  # another package has our package's name
            return _execute(f"_recipe_{path.stem}", path)
    return sys.modules[name]


def _execute(name: str, path: Path) -> ModuleType:
    """Run the file at `path` as the module `name`."""
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module, loader = importlib.util.module_from_spec(spec), spec.loader
    sys.modules[name] = module
    try:
        _guarded(lambda: loader.exec_module(module), str(path))
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _import(name: str) -> ModuleType:
    if not all(piece.isidentifier() for piece in name.split(".")):
        raise RecipeError(
            f"{name!r} names no recipe: give a recipe's name, a file or a module, with :function "
            "behind it where it holds several."
        )
    if str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _guarded(lambda: importlib.import_module(name), name, ours=name)
    if module is None:
        known = sorted({found.path.stem for found in list_recipes(BUNDLED)})
        raise RecipeError(
            f"There is no recipe {name!r}: no file recipes/{name.replace('.', '/')}.py here, and "
            f"no module of that name.{did_you_mean(name, known)} `launcher recipes` lists them."
        )
    return module


def _guarded(action: Callable[[], T], what: str, ours: str | None = None) -> T | None:
    """Run an import; say in one line what went wrong, and return None where `ours` is missing."""
    try:
        with observed_threads():
            return action()
    except LauncherError:
        raise
    except ModuleNotFoundError as error:
        if ours is not None and error.name and f"{ours}.".startswith(f"{error.name}."):
            return None
        raise cannot("import", what, error) from error
    except (Exception, SystemExit) as error:
        raise cannot("import", what, error) from error


def cannot(action: str, what: str, error: BaseException) -> RecipeError:
    """Return the error that says, in one line with its place, what user code raised."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    place = f" ({frames[-1].filename}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        place = f" ({error.filename}, line {error.lineno})"
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = _remedy(error.name)
    message = error.msg if isinstance(error, SyntaxError) else error
    return RecipeError(f"Cannot {action} {what}: {type(error).__name__}: {message}{place}.{hint}")


def _remedy(missing: str) -> str:
    """Return what to do about a module that Python has not found."""
    package, _, rest = missing.partition(".")
    if package == "recipes" and (BUNDLED / f"{rest}.py").is_file():
        return f" The recipe that launcher ships is imported as {_PACKAGE}.{rest}."
    if package in sys.modules or _spec(package) is not None:
        return f" The {package!r} that Python found is {_origin(package)}."
    if (Path.cwd() / package).is_dir() or (Path.cwd() / f"{package}.py").is_file():
        return (
            f" There is a {package!r} in {Path.cwd()}, where Python does not look: set PYTHONPATH "
            "to that folder."
        )
    return f" Install {package!r} into this environment."


def _spec(package: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None


def _origin(package: str) -> str:
    """Return the file of a package, or the folders of one that has none."""
    module, spec = sys.modules.get(package), _spec(package)
    file = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    folders = getattr(module, "__path__", None) or getattr(spec, "submodule_search_locations", None)
    return file or " and ".join(folders or ["built in"])


def _reference(module: ModuleType, place: str, function: str) -> Reference:
    if not function:
        function = _only_recipe(module, place)
    found = getattr(module, function, None)
    if not callable(found):
        names = _recipe_functions(module)
        raise RecipeError(
            f"{place} has no function {function!r}."
            + (f" Its recipes: {', '.join(names)}." if names else "")
            + did_you_mean(function, names)
        )
    return Reference(location=f"{place}:{function}", function=found)


def _only_recipe(module: ModuleType, place: str) -> str:
    stem = module.__name__.rpartition(".")[2].removeprefix("_recipe_")
    names = _recipe_functions(module)
    if stem in names or (not names and callable(getattr(module, stem, None))):
        return stem
    if len(names) == 1:
        return names[0]
    if names:
        raise RecipeError(
            f"{place} has several recipes: {', '.join(names)}. Say which: {place}:{names[0]}"
        )
    raise RecipeError(
        f"{place} has no recipe: no function is called {stem!r} or annotated `-> Recipe`. "
        f"Annotate it, or name it: {place}:FUNCTION"
    )


def _recipe_functions(module: ModuleType) -> list[str]:
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and value.__module__ == module.__name__
        and str(value.__annotations__.get("return", "")).rpartition(".")[2].strip("'\">")
        == "Recipe"
    ]


def _is_from(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


def _nearby(path: Path) -> str:
    folder = path.parent
    if not folder.is_dir():
        return f" There is no folder {str(folder)!r} either."
    return did_you_mean(path.name, [entry.name for entry in folder.glob("*.py")])
