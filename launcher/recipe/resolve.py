"""Recipe functions, found by what a user types.

    digits                      ./recipes/digits.py, or else the shipped recipe of that name
    recipes/digits.py           a file: its function `digits`, or the only one annotated `-> Recipe`
    recipes/digits.py:wide      the function `wide` of that file
    my_project.recipes:wide     a module, found as `python -m` finds it from the working folder
    launcher.recipes.digits     a shipped recipe, by the name that Python imports it by

Files are loaded by path, so that another installed package called `recipes` cannot shadow them.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, fields, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import CodeType, ModuleType
from typing import TypeVar

from launcher import paths
from launcher.errors import LauncherError, RecipeError, did_you_mean
from launcher.forking import observed_threads
from launcher.printable import class_name, printable, text_of
from launcher.recipe.foreign_names import hint_for_unknown
from launcher.recipe.frozen_code import FrozenCode, import_from
from launcher.recipe.plain_script import WHAT_A_RECIPE_IS, refuse_plain_script
from launcher.recipe.recipe import Recipe
from launcher.recipe.validation import brief

T = TypeVar("T")

BUNDLED = (Path(__file__).parents[1] / "recipes").resolve()
"""The folder of the recipes that this package ships; in a clone it is a symbolic link."""

_PACKAGE = "launcher.recipes"
"""The package that Python imports the shipped recipes from."""

_FORMERLY_BUNDLED = Path(__file__).resolve().parents[2] / "recipes"
"""Where version 0.1 installed the shipped recipes; run.yaml of its runs names files there."""


_MAX_BYTES = 4 * 2**20
"""Size of the largest file that is read as a recipe."""

_imported: ContextVar[str | None] = ContextVar("imported", default=None)
"""The file or module that this thread is importing as a recipe; None if there is none."""


@dataclass(frozen=True, kw_only=True)
class Reference:
    """A recipe function and its location."""

    location: str
    """`file:function` with an absolute path, or `module:function`, for use in other processes."""

    function: Callable[..., Recipe]

    folder: Path | None = None
    """The temporary folder of the files that hold a function by its value, which a run copies into
    its own folder; None for a function of a file or module."""

    code: FrozenCode | None = None
    """The copy of the project that it is imported from; None if that is the project itself."""

    @property
    def recorded(self) -> str:
        """The location as run.yaml has it: in the run folder for a function that is in no file."""
        if self.folder is None:
            return self.location
        return f".{self.location.removeprefix(str(self.folder))}"

    @property
    def name(self) -> str:
        """Return the name of the function."""
        return self.location.rpartition(":")[2]

    @property
    def shown(self) -> str:
        """Return `location`, relative to the working folder if it is below it.

        A function that is in no file is shown by its name.
        """
        if self.folder is not None:
            return self.name
        return self.location.removeprefix(f"{Path.cwd()}{os.sep}")


@dataclass(frozen=True, kw_only=True)
class ListedRecipe:
    """A recipe function found in a file without importing it."""

    path: Path
    function: str
    sentence: str
    """First line of the function's docstring."""


def resolve(text: str, code: FrozenCode | None = None) -> Reference:
    """Import and return the recipe function that `text` names, in a form listed above.

    Args:
        text: The name.
        code: A copy of the recipe's project from which this process imports from now on; None
            imports from the project itself.

    Raises:
        RecipeError: Nothing has that name, the import fails, or the function is not clear.
    """
    target, _, function = text.partition(":")
    path = find_file(target)
    if code is not None:
        import_from(code)
        path = None if path is None else code.place(path)
    if path is not None:
        if path.stat().st_size > _MAX_BYTES:
            raise RecipeError(
                f"{target} is too large to be a recipe: it has {path.stat().st_size:,} bytes, and "
                f"launcher reads at most {_MAX_BYTES:,}."
            )
        refuse_plain_script(path, function, shown=target)
        module, location = _load(path), str(path)
    elif target.endswith(".py") or os.sep in target:
        raise _no_file(target)
    else:
        module, location = _import(target, function, code), target
    return replace(_reference(module, location, function), code=code)


def reference_of(function: Callable[..., Recipe]) -> Reference:
    """Return the reference of a recipe function, such as the one that `main` is called with.

    Raises:
        RecipeError: It is another kind of callable, which no other process could find by its name.
    """
    if not _is_function(function):
        raise RecipeError(
            f"{brief(repr(function))} is not a Python function. Pass a recipe function, which "
            "returns launcher.Recipe(...), and give its arguments as name=value."
        )
    try:
        location = str(Path(inspect.getsourcefile(inspect.unwrap(function)) or "").resolve())
    except TypeError:
        location = getattr(function, "__module__", "?")
    return Reference(location=f"{location}:{function.__name__}", function=function)


def check_not_importing() -> None:
    """Refuse to start a run while a recipe is imported, which the ranks of the run do as well.

    Raises:
        RecipeError: This is called by the file of a recipe, at its top level.
    """
    if (imported := _imported.get()) is not None:
        raise RecipeError(
            f"{imported} starts a run whenever it is imported, and the ranks of a run import it. "
            'Start the run under `if __name__ == "__main__":`.'
        )


def check_importable(reference: Reference) -> None:
    """Refuse a recipe function of a file that other processes could not import.

    Raises:
        RecipeError: The function is not at the top level of a module.
    """
    function = reference.function
    module = sys.modules.get(function.__module__)
    if getattr(module, function.__name__, None) is not function:
        raise RecipeError(
            f"{function.__qualname__} is not at the top level of a file, so the ranks cannot "
            "import it. Move it there; what it depends on can be a parameter, given as name=value."
        )


def is_in_no_file(function: Callable[..., Recipe]) -> bool:
    """Return whether a function was typed into a notebook or at a prompt."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if not isinstance(code, CodeType):
        return False
    is_typed = function.__module__ == "__main__" and not hasattr(
        sys.modules["__main__"], "__file__"
    )
    return is_typed or not paths.exists(code.co_filename)


def known_recipes() -> dict[str, str]:
    """Return the sentences of the recipes in ./recipes and of the shipped ones, by name.

    A recipe in ./recipes hides a shipped one of the same name.
    """
    local = Path("recipes").resolve()
    folders = [local, BUNDLED] if local != BUNDLED and paths.is_dir(local) else [BUNDLED]
    sentences: dict[str, str] = {}
    for folder in folders:
        for recipe in list_recipes(folder):
            stem = recipe.path.stem
            name = stem if recipe.function == stem else f"{stem}:{recipe.function}"
            sentences.setdefault(name, recipe.sentence)
    return sentences


def list_recipes(folder: Path) -> Iterator[ListedRecipe]:
    """Yield the functions annotated `-> Recipe` in the files of `folder`, without importing them.

    Files that cannot be read or parsed are skipped.
    """
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


def find_file(target: str) -> Path | None:
    """Return the file that `target` names by path or by a recipe's name, if it exists."""
    if target.endswith(".py") or os.sep in target:
        candidates = [Path(target if target.endswith(".py") else f"{target}.py")]
        if Path(target).parent == _FORMERLY_BUNDLED:
            candidates.append(BUNDLED / Path(target).name)
    elif target.startswith(f"{_PACKAGE}."):
        candidates = [BUNDLED / f"{target.removeprefix(f'{_PACKAGE}.')}.py"]
    else:
        package, dot, name = target.rpartition(".")
        if package not in ("", "recipes") or not name.isidentifier():
            return None
        folders = [Path("recipes")] if dot else [Path("recipes"), BUNDLED]
        candidates = [folder / f"{name}.py" for folder in folders]
    return next((path.resolve() for path in candidates if paths.is_file(path)), None)


def _load(path: Path) -> ModuleType:
    """Import the file at `path`, as a module of the package whose folder holds it, if any."""
    if path.parent == BUNDLED:
        module = _guarded(lambda: importlib.import_module(f"{_PACKAGE}.{path.stem}"), str(path))
        assert module is not None
        return module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    files, names, folder = [path], [path.stem], path.parent
    while paths.is_file(folder / "__init__.py"):
        files.insert(0, folder / "__init__.py")
        names.insert(0, folder.name)
        folder = folder.parent
    for depth, file in enumerate(files, start=1):
        name = ".".join(names[:depth])
        if name not in sys.modules:
            _execute(name, file)
        elif not _is_from(sys.modules[name], file):  # the name belongs to another package
            return _execute(f"_recipe_{path.stem}", path)
    return sys.modules[name]


def _execute(name: str, path: Path) -> ModuleType:
    """Run the file at `path` as the module `name`, and return the module."""
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


def _import(name: str, function: str, code: FrozenCode | None) -> ModuleType:
    if paths.is_file(Path(name)):
        raise RecipeError(
            f"{brief(repr(name))} is a file, but the name of a recipe's file ends in .py."
        )
    if not all(piece.isidentifier() for piece in name.split(".")):
        raise RecipeError(
            f"{brief(repr(name))} is not the name of a recipe: give a recipe's name, a file or a "
            "module, followed by :FUNCTION if it holds several recipes."
        )
    folder = str(Path.cwd() if code is None else code.place(Path.cwd()))
    if folder not in sys.path:
        sys.path.insert(0, folder)

    def load() -> ModuleType:
        spec = importlib.util.find_spec(name)
        if name not in sys.modules and spec is not None and (spec.origin or "").endswith(".py"):
            refuse_plain_script(Path(str(spec.origin)), function, shown=str(spec.origin))
        return importlib.import_module(name)

    module = _guarded(load, name, ours=name)
    if module is None:
        raise RecipeError(
            f"There is no recipe {brief(repr(name))}: no file of that name in the folder recipes "
            f"below the working folder, and no module of that name.{_similar_recipe(name)} "
            "`launcher recipes` lists all recipes."
        )
    return module


def _similar_recipe(name: str) -> str:
    """Return which recipe may be meant by a name, which is that of a function or is misspelt."""
    known = known_recipes()
    matches = [recipe for recipe in known if recipe.partition(":")[2] == name]
    return f" Did you mean {' or '.join(matches)}?" if matches else did_you_mean(name, known)


def _guarded(action: Callable[[], T], what: str, ours: str | None = None) -> T | None:
    """Return the result of an import.

    Args:
        action: The import.
        what: What is imported, for the message.
        ours: The module that may be missing without an error; the result is None then.

    Raises:
        RecipeError: The import raised an exception, which the message shows in one line.
    """
    token = _imported.set(what)
    try:
        with observed_threads():
            return action()
    except (LauncherError, KeyboardInterrupt):
        raise
    except ModuleNotFoundError as error:
        if ours is not None and error.name and f"{ours}.".startswith(f"{error.name}."):
            return None
        raise user_code_error("import", what, error) from error
    except BaseException as error:
        raise user_code_error("import", what, error) from error
    finally:
        _imported.reset(token)


def user_code_error(action: str, what: str, error: BaseException) -> RecipeError:
    """Return an error that shows in one line what user code raised, and where.

    Args:
        action: What failed, as a verb: `import`, `build`, `read the data of`.
        what: What the verb applies to: a file, a module or a recipe.
        error: The exception that was raised.
    """
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith("<frozen") and frame.filename != __file__
    ]
    line = f" ({shown_file(frames[-1].filename)}, line {frames[-1].lineno})" if frames else ""
    if isinstance(error, SyntaxError):
        line = f" ({error.filename}, line {error.lineno})" if error.lineno else ""
    hint = ""
    if isinstance(error, ModuleNotFoundError) and error.name:
        hint = _remedy(error.name)
    if isinstance(error, TypeError):
        hint = _field_hint(text_of(error, 2_000))
    message = text_of(error, 2_000)
    if isinstance(error, SyntaxError):
        message = printable(str(error.msg))
    return RecipeError(f"Cannot {action} {what}: {class_name(error)}: {message}{line}.{hint}")


def shown_file(file: str) -> str:
    """Return the name of a file of code; a cell of a notebook is shown as `<cell In[3]>`."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    cells = getattr(getattr(shell, "compile", None), "_filename_map", {})
    return f"<cell In[{cells[file]}]>" if file in cells else file


def _field_hint(message: str) -> str:
    """Return what to write instead of a field that `Recipe` does not have."""
    match = re.fullmatch(
        r"Recipe\.__init__\(\) got an unexpected keyword argument '(\w+)'.*", message
    )
    if match is None:
        return ""
    known = [item.name for item in fields(Recipe)]
    return f"{hint_for_unknown(match[1], known)} `launcher settings` lists the settings."


def _remedy(missing: str) -> str:
    """Return what to do about a module that Python did not find."""
    package, _, rest = missing.partition(".")
    if package == "recipes" and paths.is_file(BUNDLED / f"{rest}.py"):
        return f" The shipped recipe is imported as {_PACKAGE}.{rest}."
    if package in sys.modules or _spec(package) is not None:
        return f" The {package!r} that Python found is {_origin(package)}."
    if paths.is_dir(Path.cwd() / package) or paths.is_file(Path.cwd() / f"{package}.py"):
        return (
            f" There is a {package!r} in {Path.cwd()}, which is not on Python's path: set "
            "PYTHONPATH to that folder."
        )
    return f" Install {package!r} into this environment."


def _spec(package: str) -> ModuleSpec | None:
    try:
        return importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None


def _origin(package: str) -> str:
    """Return the file of a package, or the folders of a namespace package, for a message."""
    module, spec = sys.modules.get(package), _spec(package)
    file = getattr(module, "__file__", None) or (spec.origin if spec is not None else None)
    folders = getattr(module, "__path__", None) or getattr(spec, "submodule_search_locations", None)
    return file or " and ".join(folders or ["built in"])


def _reference(module: ModuleType, location: str, function: str) -> Reference:
    if not function:
        function = _only_recipe(module, location)
    value = getattr(module, function, None)
    if not callable(value):
        names = _recipe_functions(module)
        raise RecipeError(
            f"{location} has no function {brief(repr(function))}."
            + (f" Its recipes: {', '.join(names)}." if names else "")
            + did_you_mean(function, names or _own_functions(module))
        )
    if inspect.iscoroutinefunction(value):
        raise RecipeError(f"{location}:{function} is an async function. Write `def {function}`.")
    if not _is_function(value):
        found = "a class" if inspect.isclass(value) else brief(repr(value))
        raise RecipeError(
            f"{location}:{function} is {found}, and a recipe is a Python function that returns "
            "launcher.Recipe(...). Name such a function."
        )
    return Reference(location=f"{location}:{function}", function=value)


def _only_recipe(module: ModuleType, location: str) -> str:
    """Return the name of the function that is called as its module, or is its only recipe.

    Raises:
        RecipeError: The module has several recipes, or none.
    """
    stem = module.__name__.rpartition(".")[2].removeprefix("_recipe_")
    names = _recipe_functions(module)
    if stem in names or (not names and callable(getattr(module, stem, None))):
        return stem
    if len(names) == 1:
        return names[0]
    if names:
        raise RecipeError(
            f"{location} has several recipes: {', '.join(names)}. Name one of them: "
            f"{location}:{names[0]}"
        )
    raise RecipeError(
        f"{location} has no recipe: no function is called {stem!r} or annotated `-> Recipe`. "
        f"Annotate the function, or name it: {location}:FUNCTION. {WHAT_A_RECIPE_IS}"
    )


def _recipe_functions(module: ModuleType) -> list[str]:
    """Return the names of the public functions of a module that are annotated `-> Recipe`."""
    return [
        name
        for name in _own_functions(module)
        if str(vars(module)[name].__annotations__.get("return", ""))
        .rpartition(".")[2]
        .strip("'\">")
        == "Recipe"
    ]


def _own_functions(module: ModuleType) -> list[str]:
    """Return the names of the public functions that a module defines."""
    return [
        name
        for name, value in vars(module).items()
        if inspect.isfunction(value)
        and not name.startswith("_")
        and value.__module__ == module.__name__
    ]


def _is_from(module: ModuleType, path: Path) -> bool:
    file = getattr(module, "__file__", None)
    return file is not None and Path(file).resolve() == path


def _is_function(value: object) -> bool:
    """Return whether a value is a function with a signature, as opposed to a class or a builtin."""
    if not inspect.isroutine(value) or inspect.isbuiltin(value):
        return False
    try:
        inspect.signature(value)
    except (TypeError, ValueError):
        return False
    return True


def _no_file(target: str) -> RecipeError:
    """Return the error for a path at which there is no file of a recipe."""
    shown, path = brief(repr(target)), Path(target)
    if paths.is_dir(path):
        return RecipeError(f"{shown} is a folder. Give the file of a recipe in it.")
    if paths.exists(path):
        return RecipeError(
            f"{shown} is not a Python file, whose name ends in .py. Give the file of a recipe."
        )
    if not paths.is_dir(path.parent):
        folder = brief(repr(str(path.parent)))
        return RecipeError(f"There is no file {shown}. There is no folder {folder} either.")
    if paths.is_link(path):
        return RecipeError(f"{shown} is a link to a file that does not exist.")
    if path.stem in known_recipes() and path.parent == Path():
        return RecipeError(
            f"There is no file {shown}. The recipe {path.stem} is named without .py."
        )
    names = [entry.name for entry in path.parent.glob("*.py")]
    return RecipeError(f"There is no file {shown}.{did_you_mean(path.name, names)}")
