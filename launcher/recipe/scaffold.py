"""`launcher new`: start a recipe from a template, or from a copy of another recipe's file."""

from __future__ import annotations

import keyword
import sys
from importlib.machinery import PathFinder
from pathlib import Path

from launcher.errors import UsageError
from launcher.recipe.resolve import Reference

_TEMPLATE = Path(__file__).with_name("template.py.jinja")


def new_recipe(target: Path) -> None:
    """Write a recipe to start from, whose function has the name of the file.

    Raises:
        UsageError: The name cannot be that of a function or is that of a module, the file exists,
            or it cannot be written.
    """
    import jinja2

    _check_name(target)
    template = jinja2.Template(_TEMPLATE.read_text(encoding="utf-8"), keep_trailing_newline=True)
    _write(target, template.render(name=target.stem, file=target))


def copy_recipe(reference: Reference, target: Path) -> None:
    """Copy the file of a recipe unchanged; its functions keep their names.

    Raises:
        UsageError: The recipe is not in a file, the target exists, or it cannot be written.
    """
    _check_name(target)
    source = Path(reference.location.rpartition(":")[0])
    if not source.is_file():
        raise UsageError(
            f"{reference.location} is not in a file that can be copied. Name a recipe by its file."
        )
    _write(target, source.read_text(encoding="utf-8"))


def _check_name(target: Path) -> None:
    name = target.stem
    if not (name.isascii() and name.isidentifier()) or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a recipe, which is the name of a Python function and "
            "of run folders: use the letters a to z, digits and underscores, and no word of "
            "Python's own."
        )
    if target.suffix != ".py":
        raise UsageError(f"{target}: a recipe is a Python file. Use {target.with_suffix('.py')}.")
    if name in sys.stdlib_module_names or _is_installed(name):
        raise UsageError(
            f"{target} would hide the module {name} from the programs in its folder, which import "
            "their modules from there first. Choose another name."
        )


def _is_installed(name: str) -> bool:
    """Return whether a module or package of this name is installed beside launcher or torch."""
    folders = [folder for folder in sys.path if Path(folder).name.endswith("-packages")]
    return name == "launcher" or PathFinder.find_spec(name, folders) is not None


def _write(target: Path, text: str) -> None:
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError:
        raise UsageError(f"{target} already exists. Choose another name.") from None
    except OSError as error:
        raise UsageError(
            f"Cannot write {target}: {error.strerror}. Give a file in a folder that you can write "
            "to."
        ) from None
