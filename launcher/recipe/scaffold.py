"""A recipe of one's own to start from: a copy of another, under its own name."""

from __future__ import annotations

import io
import itertools
import keyword
import tokenize
from pathlib import Path

from launcher.errors import UsageError
from launcher.recipe.resolve import Reference


def copy_recipe(reference: Reference, target: Path) -> None:
    """Write the file of a recipe to `target`, its function called as that file is.

    Raises:
        UsageError: The name is none for a function, or something is there already.
    """
    name = target.stem
    if not name.isidentifier() or keyword.iskeyword(name):
        raise UsageError(
            f"{name!r} cannot be the name of a recipe, which is a function: use letters, digits "
            "and underscores."
        )
    if target.suffix != ".py":
        raise UsageError(f"{target}: a recipe is a Python file. Use {target.with_suffix('.py')}.")
    file, _, function = reference.location.rpartition(":")
    source = Path(file)
    if not source.is_file():
        raise UsageError(f"{reference.location} is no file to copy from. Name a file.")
    text = renamed(source.read_text(encoding="utf-8"), function, name)
    if target.exists():
        raise UsageError(f"{target} is there already. Choose another name.")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with target.open("x", encoding="utf-8") as copy:
            copy.write(text)
    except OSError as error:
        raise UsageError(f"Cannot write {target}: {error.strerror}.") from None


def renamed(text: str, old: str, new: str) -> str:
    """Return Python source with one name replaced, and the string that is that name.

    What stands behind a dot is somebody else's, and stays.
    """
    lines = text.splitlines(keepends=True)
    tokens = list(tokenize.generate_tokens(io.StringIO(text).readline))
    for before, token in reversed(list(itertools.pairwise(tokens))):
        is_name = token.type == tokenize.NAME and token.string == old and before.string != "."
        if is_name or (token.type == tokenize.STRING and token.string == f'"{old}"'):
            row, start = token.start
            line = lines[row - 1]
            own = token.string.replace(old, new)
            lines[row - 1] = line[:start] + own + line[token.end[1] :]
    return "".join(lines)
