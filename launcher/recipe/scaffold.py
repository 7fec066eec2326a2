"""`launcher new`: start a recipe from a template, or from a copy of another recipe's file."""

from __future__ import annotations

import keyword
from pathlib import Path

from launcher.errors import UsageError
from launcher.recipe.resolve import Reference

_TEMPLATE = Path(__file__).with_name("template.py.jinja")


def new_recipe(target: Path) -> None:
    """Write a recipe to start from, whose function has the name of the file.

    Raises:
        UsageError: The name cannot be that of a function, the file exists, or it cannot be written.
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
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a recipe, which is the name of a Python function: use "
            "letters, digits and underscores."
        )
    if target.suffix != ".py":
        raise UsageError(f"{target}: a recipe is a Python file. Use {target.with_suffix('.py')}.")


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
