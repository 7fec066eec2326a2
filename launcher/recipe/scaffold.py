"""`launcher new`: a copy of a recipe under a new name, as a start for one's own."""

from __future__ import annotations

import io
import itertools
import keyword
import tokenize
from pathlib import Path

from launcher.errors import UsageError
from launcher.recipe.resolve import Reference


def copy_recipe(reference: Reference, target: Path) -> None:
    """Copy the file of a recipe to `target`, and rename its function after the new file.

    Raises:
        UsageError: The name cannot be a function's, the file exists, or it cannot be written.
    """
    name = target.stem
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a recipe, which is the name of a Python function: use "
            "letters, digits and underscores."
        )
    if target.suffix != ".py":
        raise UsageError(f"{target}: a recipe is a Python file. Use {target.with_suffix('.py')}.")
    file, _, function = reference.location.rpartition(":")
    source = Path(file)
    if not source.is_file():
        raise UsageError(
            f"{reference.location} is not in a file that can be copied. Name a recipe by its file."
        )
    text = renamed(source.read_text(encoding="utf-8"), function, name)
    if target.exists():
        raise UsageError(f"{target} already exists. Choose another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as copy:
            copy.write(text)
    except OSError as error:
        raise UsageError(f"Cannot write {target}: {error.strerror}.") from None


def renamed(text: str, old: str, new: str) -> str:
    """Return Python source in which the name `old`, and the string "old", is replaced by `new`.

    Attributes (names after a dot) are kept, because they belong to other objects.
    """
    lines = text.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for preceding, token in reversed(list(itertools.pairwise(tokens))):
        is_name = token.type == tokenize.NAME and token.string == old and preceding.string != "."
        if is_name or (token.type == tokenize.STRING and token.string == f'"{old}"'):
            row, start = token.start
            line = lines[row - 1]
            replacement = token.string.replace(old, new)
            lines[row - 1] = line[:start] + replacement + line[token.end[1] :]
    return "".join(lines)
