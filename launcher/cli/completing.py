"""What the shell offers behind TAB: recipes, settings with their values, run folders."""

from __future__ import annotations

import types
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin

import click

if TYPE_CHECKING:
    from click.shell_completion import CompletionItem


def complete_recipes(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the recipes there are; files, once a path or a name of none has been begun."""
    from click.shell_completion import CompletionItem

    from launcher.recipe.resolve import known_recipes

    found = [
        CompletionItem(name, help=sentence)
        for name, sentence in known_recipes().items()
        if name.startswith(incomplete)
    ]
    return found or [CompletionItem(incomplete, type="file")]


def complete_runs(
    _ctx: click.Context, _param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer the run folders below this one."""
    from pathlib import Path

    from click.shell_completion import CompletionItem

    from launcher.runs.rundir import folders_of_runs

    names = (run_dir.shown for run_dir in folders_of_runs(Path()))
    found = [CompletionItem(name) for name in names if name.startswith(incomplete)]
    return found or [CompletionItem(incomplete, type="dir")]


def complete_settings(
    ctx: click.Context, param: click.Parameter, incomplete: str
) -> list[CompletionItem]:
    """Offer NAME=, and behind it the values that a setting can have, where they are few."""
    from click.shell_completion import CompletionItem

    from launcher.recipe.recipe import field_sentences, setting_types

    before = [str(each) for each in ctx.params.get(param.name or "") or ()]
    sentences = field_sentences()
    names = [*setting_types(), "schedule", "optimizer"]
    name, equals, begun = incomplete.partition("=")
    prefix = f"{name}=" if equals else ""
    if not equals and before:
        # bash takes `lr=0.1` for three words, and leaves the second out while it is the last.
        words = before[:-1] if before[-1] == "=" else before
        if before[-1] == "=" or before[-1] in names:
            name, equals, begun = words[-1] if words else "", "=", incomplete
    if equals:
        values = _values(name)
        return [CompletionItem(prefix + value) for value in values if value.startswith(begun)]
    return [
        CompletionItem(f"{each}=", help=sentences[each])
        for each in names
        if each.startswith(incomplete) and each != "name"
    ]


def _values(name: str) -> list[str]:
    """Return the values that a setting can have, where they are few."""
    from launcher.recipe.optimizer import OPTIMIZERS
    from launcher.recipe.recipe import setting_types
    from launcher.recipe.schedules import SCHEDULES

    tables: dict[str, Any] = {"schedule": SCHEDULES, "optimizer": OPTIMIZERS}
    if name in tables:
        return [f"{each}()" for each in tables[name]]
    return _members(setting_types().get(name))


def _members(hint: Any) -> list[str]:
    origin = get_origin(hint)
    if origin is Literal:
        return [str(each) for each in get_args(hint)]
    if origin in (Union, types.UnionType, tuple):
        return [value for each in get_args(hint) for value in _members(each)]
    if hint is types.NoneType:
        return ["none"]
    return ["true", "false"] if hint is bool else []
