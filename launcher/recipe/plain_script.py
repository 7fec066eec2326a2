"""Python files that hold no recipe, such as a training script: recognised without importing them.

Importing a training script trains. A file is therefore read first, and imported only if it can
hold a recipe.
"""

from __future__ import annotations

import ast
import functools
from collections.abc import Iterable
from pathlib import Path

from launcher.errors import RecipeError
from launcher.recipe.parameters import returns_recipe

WHAT_A_RECIPE_IS = (
    "A recipe is a function, annotated `-> Recipe`, that returns launcher.Recipe(model=..., "
    "data=..., loss=..., batch_size=..., lr=..., epochs=...); launcher runs the training loop. "
    "`launcher new NAME` writes one to start from, and the documentation's page Porting a script "
    "(docs/porting.md) turns a training script into one."
)
"""What to tell somebody whose file has no recipe."""

_TRAINERS = frozenset(
    {"torch", "transformers", "lightning", "pytorch_lightning", "accelerate", "deepspeed", "jax"}
)
"""Packages that a file which is imported here to build a recipe would rather not import."""


def refuse_plain_script(path: Path, function: str = "", *, shown: str) -> None:
    """Refuse to import a file that cannot hold a recipe, because importing it may train.

    A file can hold a recipe if it imports launcher, has a function annotated `-> Recipe`, defines
    the function that is asked for, or defines the name of the file without importing a package at
    its top that trains.

    Args:
        path: The file.
        function: The function that is asked for; empty if none is.
        shown: The file, for the message.

    Raises:
        RecipeError: The file cannot hold a recipe.
    """
    try:
        content = path.read_bytes()
    except OSError:
        return  # the import reports it
    if _can_hold_recipe(content, path.stem, function):
        return
    raise RecipeError(
        f"{shown} has no recipe: it neither imports launcher nor has a function annotated "
        f"`-> Recipe`. It was not imported, because importing a script runs it. {WHAT_A_RECIPE_IS}"
    )


@functools.lru_cache(maxsize=8)  # ranks that are forked after the first call parse no file
def _can_hold_recipe(content: bytes, stem: str, function: str) -> bool:
    """Return whether a file can hold a recipe; true if it cannot be parsed."""
    try:
        tree = ast.parse(content)
    except (SyntaxError, ValueError, RecursionError):
        return True
    imported = _imported(ast.walk(tree))
    functions = [node for node in tree.body if isinstance(node, ast.FunctionDef)]
    if "launcher" in imported or any(map(returns_recipe, functions)):
        return True
    bound = _bound(tree)
    if function and {function, "*"} & bound:
        return True
    return bool({stem, "*"} & bound) and _TRAINERS.isdisjoint(_imported(tree.body))


def _imported(nodes: Iterable[ast.AST]) -> set[str]:
    """Return the top-level packages that some nodes of a syntax tree import."""
    packages: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            packages |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            packages.add(node.module.partition(".")[0])
    return packages


def _bound(tree: ast.Module) -> set[str]:
    """Return the names that a file defines or imports; `*` if it imports all names of a module."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names |= {alias.asname or alias.name for alias in node.names}
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names
