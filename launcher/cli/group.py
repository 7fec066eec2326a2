"""A click group that imports a command only when it is used."""

from __future__ import annotations

import importlib
import shlex
from collections.abc import Mapping
from typing import Any

import click

from launcher.errors import UsageError, did_you_mean
from launcher.interrupted_start import raise_when_interrupted

_WORDS_FOR_RUN = ("train", "fit", "start", "launch")
"""Commands of other programs that train."""


class LazyGroup(click.Group):
    """A group whose commands are imported when they are used.

    Args:
        modules: The module of each command by name; it defines a click command called `command`.
    """

    def __init__(self, *args: Any, modules: Mapping[str, str], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._modules = modules

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        name = args[0]
        if name in self._modules or name.startswith("-") or ctx.resilient_parsing:
            return super().resolve_command(ctx, args)
        from launcher.recipe.validation import brief

        raise UsageError(
            f"There is no command {brief(repr(name))}.{self._hint(ctx, name, args[1:])} "
            f"`{ctx.command_path} --help` lists the commands."
        )

    def _hint(self, ctx: click.Context, name: str, following: list[str]) -> str:
        """Return what may have been meant by a command that does not exist."""
        from launcher.recipe.resolve import find_file
        from launcher.recipe.validation import brief

        if ctx.parent is None and name in _WORDS_FOR_RUN:
            return f" To train a recipe, write `{ctx.command_path} run RECIPE`."
        if ctx.parent is None and find_file(name.partition(":")[0]) is not None:
            words = shlex.join([ctx.command_path, "run", name, *following])
            return f" To train this recipe, write `{brief(words)}`."
        return did_you_mean(name, self._modules)

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(self._modules)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in self._modules:
            return None
        command = importlib.import_module(self._modules[cmd_name]).command
        assert isinstance(command, click.Command)
        raise_when_interrupted()
        return command
