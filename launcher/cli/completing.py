"""Shell completion of recipes, settings with their values, and run folders."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def complete_recipes(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete names of recipes, and Python files of the working folder.

    If there is none, the shell completes files.
    """
    from pathlib import Path

    from click.shell_completion import CompletionItem

    from launcher.recipe.resolve import known_recipes

    matches = [
        CompletionItem(name, help=sentence)
        for name, sentence in known_recipes().items()
        if name.startswith(incomplete)
    ]
    files = sorted(path.name for path in Path().glob("*.py") if path.name.startswith(incomplete))
    matches += [CompletionItem(name) for name in files]
    return matches or [CompletionItem(incomplete, type="file")]


def complete_runs(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete run folders below the working folder."""
    from pathlib import Path

    from click.shell_completion import CompletionItem

    from launcher.runs.rundir import find_run_dirs

    names = (run_dir.shown for run_dir in find_run_dirs(Path()))
    matches = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return matches or [CompletionItem(incomplete, type="dir")]


def complete_settings(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete NAME= and, for settings with few values, the value behind it."""
    from click.shell_completion import CompletionItem

    from launcher.recipe.catalogue import settings

    before = [str(word) for word in ctx.params.get(param.name or "") or ()]
    parameters = parameter_names(str(ctx.params.get("recipe") or ""))
    sentences = dict.fromkeys(parameters, "parameter of the recipe")
    sentences |= {name: setting.sentence for name, setting in settings().items()}
    names = list(sentences)
    name, equals, begun = incomplete.partition("=")
    prefix = f"{name}=" if equals else ""
    if not equals and before:
        # bash splits `lr=0.1` into three words, and omits the second while it is the last.
        words = before[:-1] if before[-1] == "=" else before
        if before[-1] == "=" or before[-1] in names:
            name, equals, begun = words[-1] if words else "", "=", incomplete
    if equals:
        values = _values(name)
        return [CompletionItem(prefix + value) for value in values if value.startswith(begun)]
    return [
        CompletionItem(f"{setting}=", help=sentences[setting])
        for setting in names
        if setting.startswith(incomplete)
    ]


def complete_setting_names(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Complete the names of settings."""
    from click.shell_completion import CompletionItem

    from launcher.recipe.catalogue import settings

    return [
        CompletionItem(name, help=setting.sentence)
        for name, setting in settings().items()
        if name.startswith(incomplete)
    ]


def parameter_names(recipe: str) -> list[str]:
    """Return the parameters of a recipe that is named on a command line, without importing it.

    The list is empty if there is no file of a recipe of that name.
    """
    from launcher.recipe.parameters import names_in_source
    from launcher.recipe.resolve import find_file

    target, _, function = recipe.partition(":")
    path = find_file(target) if target else None
    return [] if path is None else names_in_source(path, function)


def _values(name: str) -> list[str]:
    """Return the values of a setting if they are few; otherwise an empty list."""
    from launcher.recipe.catalogue import CALLS
    from launcher.recipe.recipe import setting_types

    if name in CALLS:
        return [f"{function}()" for function in CALLS[name]]
    return _members(setting_types().get(name))


def _members(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin is Literal:
        return [str(value) for value in get_args(hint)]
    if origin in (Union, types.UnionType, tuple):
        return [value for member in get_args(hint) for value in _members(member)]
    if hint is types.NoneType:
        return ["none"]
    return ["true", "false"] if hint is bool else []
