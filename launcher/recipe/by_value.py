"""Recipe functions that are in no file, such as those of a notebook's cell, kept by their value.

Other processes cannot import what a person typed into a cell or at a prompt. cloudpickle therefore
writes the function, and everything of the notebook that it uses, to the file recipe.pickle. The
file recipe.py beside it is an ordinary recipe file that reads the pickle. What the function uses
from modules is imported, and not copied.

The pickle belongs to the version of Python that wrote it, because it contains byte code.
"""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import linecache
import pickle
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType, ModuleType
from typing import Any

import cloudpickle

from launcher import paths
from launcher.errors import RecipeError, RunDirError
from launcher.printable import error_line, kind_of
from launcher.recipe.recipe import Recipe
from launcher.recipe.resolve import shown_file
from launcher.regular_file import overwrite, read_regular

MODULE_FILE, PICKLE_FILE = "recipe.py", "recipe.pickle"
"""The names of the two files."""

_MAX_BYTES = 1 << 34
"""Largest pickle that is read."""

_MODULE = '''\
"""The recipe {name}, which was defined in a notebook or at a prompt and not in a file.

launcher.run wrote this file for the ranks of the run in this folder. {pickle} holds the
definitions, and only Python {python} can read it. Their source, as far as it is known, stands below
for readers; changing it has no effect.
"""

from launcher.recipe.by_value import load

globals().update(load(__file__, "{name}", python="{python}", digest="{digest}"))
'''


def write(function: Callable[..., Recipe], folder: Path) -> str:
    """Write a recipe function to the two files in `folder`; return its location there.

    Raises:
        RecipeError: The function, or something that it uses, cannot be pickled.
        RunDirError: The files cannot be written.
    """
    content = io.BytesIO()
    pickler = _Pickler(content)
    try:
        # The list grows while the function is pickled, and is pickled after it.
        pickler.dump((function, pickler.definitions))
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        raise _refusal(function, error) from error
    name = function.__name__ if function.__name__.isidentifier() else "recipe"
    files = [
        shown_file(definition.__code__.co_filename) if isinstance(definition, FunctionType) else ""
        for definition in pickler.definitions
    ]
    sources = _sources(pickler.definitions)
    pickle.dump((files, sources), content)
    module = _MODULE.format(
        name=name,
        pickle=PICKLE_FILE,
        python=_python_version(),
        digest=hashlib.sha256(content.getbuffer()).hexdigest(),
    )
    for text in sources.values():
        lines = [line for line in text.splitlines() if line.strip()]
        module += "\n" + "".join(f"# {line}\n" for line in lines)
    try:
        overwrite(folder / PICKLE_FILE, content.getvalue())
        overwrite(folder / MODULE_FILE, module.encode("utf-8", "backslashreplace"))
    except OSError as error:
        raise RunDirError(
            f"Cannot write the recipe {name} to {error.filename or folder}: {error.strerror}."
        ) from None
    return f"{folder / MODULE_FILE}:{name}"


def load(module_file: str, name: str, *, python: str, digest: str) -> dict[str, Callable[..., Any]]:
    """Return the recipe function that is pickled beside a module file, by its name.

    The function is also called `recipe`, so that the name can be left out where the file is named.
    Classes and functions that were pickled with it get a module of their own, by which further
    pickles refer to them.

    Args:
        module_file: The file recipe.py.
        name: The name of the function.
        python: The version of Python that wrote the pickle.
        digest: SHA-256 of the pickle.

    Raises:
        RecipeError: Another version of Python wrote the pickle, or it is missing or damaged.
    """
    path = Path(module_file).with_name(PICKLE_FILE)
    if python != _python_version():
        raise RecipeError(
            f"{path} holds the recipe {name} as Python {python} compiled it, and this is Python "
            f"{_python_version()}. Use Python {python}, or define the recipe in a file: "
            f"{MODULE_FILE} beside it shows the source."
        )
    module_name = f"launcher_recipe_{digest[:16]}"
    if module_name not in sys.modules:
        try:
            content = read_regular(path, _MAX_BYTES)
        except OSError as error:
            reason = error.strerror or error
            raise RecipeError(
                f"{MODULE_FILE} needs {path}, which cannot be read: {reason}."
            ) from None
        if hashlib.sha256(content).hexdigest() != digest:
            raise RecipeError(
                f"{path} is damaged: it is not the file that was written with {MODULE_FILE}."
            )
        if str(Path.cwd()) not in sys.path:  # for modules that lie beside the notebook
            sys.path.insert(0, str(Path.cwd()))
        sys.modules[module_name] = _module(module_name, io.BytesIO(content))
    function = vars(sys.modules[module_name])["__recipe__"]
    return {name: function, "recipe": function}


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]  # it has no annotations
    """Pickles by value, lists the definitions it pickles, and refuses what loses its meaning.

    Args:
        file: The stream that is written to.
    """

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self.definitions: list[FunctionType | type] = []
        """The functions and classes of the notebook that have been pickled."""

    def reducer_override(self, obj: Any) -> Any:
        if reason := _reason_to_refuse(obj):
            raise pickle.PicklingError(reason)
        if isinstance(obj, (FunctionType, type)) and obj.__module__ == "__main__":
            self.definitions.append(obj)
        return super().reducer_override(obj)


class _Unpickler(pickle.Unpickler):
    """Makes classes of its own, also in the process whose classes were pickled.

    cloudpickle would otherwise return the notebook's classes, as they were when it pickled them.
    """

    def find_class(self, module: str, name: str) -> Any:
        found = super().find_class(module, name)
        if module.startswith("cloudpickle") and name in (
            "_make_skeleton_class",
            "_make_skeleton_enum",
        ):
            signature = inspect.signature(found)

            def make(*arguments: Any) -> Any:
                bound = signature.bind(*arguments)
                bound.arguments["class_tracker_id"] = None
                return found(*bound.args, **bound.kwargs)

            return make
        return found


def _module(name: str, content: io.BytesIO) -> ModuleType:
    """Return a module of the definitions in a pickle, with the recipe as `__recipe__`."""
    module = ModuleType(name, "Definitions of a notebook that a recipe uses.")
    function, definitions = _Unpickler(content).load()
    files, sources = pickle.load(content)  # noqa: S301  # what has been unpickled before does more
    for file, text in sources.items():  # tracebacks show the lines
        lines = text.splitlines(keepends=True)
        linecache.cache[file] = (len(text), None, lines, file)
    for definition, file in zip(definitions, files, strict=True):
        definition.__module__ = name
        if isinstance(definition, FunctionType):
            definition.__code__ = _placed(definition.__code__, file)
        if definition.__qualname__.isidentifier():
            vars(module).setdefault(definition.__qualname__, definition)
    vars(module)["__recipe__"] = function
    return module


def _placed(code: CodeType, file: str) -> CodeType:
    """Return code as that of a file, whose name cloudpickle leaves out."""
    constants = (
        _placed(each, file) if isinstance(each, CodeType) else each for each in code.co_consts
    )
    return code.replace(co_filename=file, co_consts=tuple(constants))


def _python_version() -> str:
    return f"{sys.version_info.major}.{sys.version_info.minor}"


def _reason_to_refuse(value: Any) -> str | None:
    """Return what keeps a value from meaning the same in another process; None if nothing does."""
    if isinstance(value, io.IOBase) and not isinstance(value, (io.BytesIO, io.StringIO)):
        return "an open file"
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.device.type != "cpu":
        return f"a tensor on {value.device}"
    return None


def _refusal(function: Callable[..., Recipe], error: BaseException) -> RecipeError:
    """Return the error about a function that cannot be pickled, which names the value at fault."""
    name = function.__name__
    culprit = next(_culprits(function), None)
    if culprit is None:
        reason = f"pickling it raises {error_line(error)}"
        remedy = "Make what cannot be pickled inside the functions that use it"
    else:
        user, variable, value, found = culprit
        what = _reason_to_refuse(value)
        reason = f"{user} uses `{variable}`, {what or kind_of(value)}"
        if what is None:
            reason += f", which cannot be pickled ({error_line(found)})"
        remedy = f"Make it inside {user}"
    return RecipeError(
        f"The recipe {name} is in no file, and it cannot be sent to the ranks, which are processes "
        f"of their own: {reason}. {remedy}, or write the recipe to a file with all that it needs "
        f"(in a notebook, with %%writefile {name}.py), and pass the file's name."
    )


def _culprits(
    function: Callable[..., Recipe],
) -> Iterator[tuple[str, str, Any, BaseException]]:
    """Yield the values that cannot be pickled: who uses each, by which name, and the error."""
    waiting: list[Any] = [inspect.unwrap(function)]
    seen: set[int] = set()
    while waiting:
        user = waiting.pop(0)
        if id(user) in seen:
            continue
        seen.add(id(user))
        if isinstance(user, type):
            waiting += [value for value in vars(user).values() if isinstance(value, FunctionType)]
            continue
        for name, value in _used(user).items():
            if isinstance(value, (FunctionType, type)) and value.__module__ == "__main__":
                waiting.append(value)
            elif (error := _pickling_error(value)) is not None:
                yield user.__qualname__, name, value, error


def _used(function: FunctionType) -> Mapping[str, Any]:
    """Return the variables outside of a function that it uses, with their values."""
    used: dict[str, Any] = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            used[name] = cell.cell_contents
        except ValueError:  # not assigned yet
            continue
    names = {name for code in _nested(function.__code__) for name in code.co_names}
    known = function.__globals__
    used |= {name: known[name] for name in sorted(names) if name in known}
    defaults = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return used | {f"argument default {number}": value for number, value in enumerate(defaults, 1)}


def _nested(code: CodeType) -> Iterator[CodeType]:
    """Yield a code object, and those of the functions and classes that are defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _nested(constant)


def _pickling_error(value: Any) -> BaseException | None:
    try:
        _Pickler(io.BytesIO()).dump(value)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # noqa: BLE001  # whatever user-defined types raise
        return error
    return None


def _sources(definitions: list[FunctionType | type]) -> dict[str, str]:
    """Return the text of definitions by the name of their cell.

    Other lines of a cell, which may hold a password, are empty.
    """
    lines_of: dict[str, set[int]] = {}
    names: dict[str, str] = {}
    for definition in definitions:
        if isinstance(definition, FunctionType):
            code = definition.__code__
            if not paths.exists(code.co_filename):
                lines_of.setdefault(code.co_filename, set()).add(code.co_firstlineno)
                names[code.co_filename] = shown_file(code.co_filename)
    classes = {definition.__name__ for definition in definitions if isinstance(definition, type)}
    texts: dict[str, str] = {}
    for file, numbers in lines_of.items():
        lines = linecache.getlines(file)
        kept: set[int] = set()
        for node in _statements("".join(lines)):
            decorators = getattr(node, "decorator_list", [])
            first = min([node.lineno, *(each.lineno for each in decorators)])
            span = range(first, (node.end_lineno or first) + 1)
            is_class = isinstance(node, ast.ClassDef) and node.name in classes
            if is_class or not numbers.isdisjoint(span):
                kept |= set(span)
        if kept:
            last = max(kept)
            texts[names[file]] = "".join(
                line if number in kept else "\n"
                for number, line in enumerate(lines[:last], start=1)
            )
    return texts


def _statements(text: str) -> list[ast.stmt]:
    try:
        return ast.parse(text).body
    except (SyntaxError, ValueError, RecursionError):
        return []
