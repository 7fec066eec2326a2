"""A command that takes settings: its help, and what it says of an option that does not exist."""

from __future__ import annotations

import inspect
import re
import shlex
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from launcher.cli.completing import parameter_names
from launcher.console.echo import echo
from launcher.errors import LauncherError, UsageError

if TYPE_CHECKING:
    from launcher.recipe.recipe import Recipe

_NAMED_RECIPE = "launcher.recipe"
"""Key in a context's `meta` of the recipe that a command line which asks for help names."""


class SettingsCommand(click.Command):
    """A command that takes NAME=VALUE: its help ends with the parameters of the recipe it names.

    Args:
        function: The recipe function, if the command belongs to one; otherwise the command's
            argument RECIPE names it, and is imported for the help alone.
    """

    def __init__(
        self, *args: Any, function: Callable[..., Recipe] | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self._function = function
        self.params.append(
            click.Option(
                ["--help-settings"],
                is_flag=True,
                is_eager=True,
                expose_value=False,
                callback=_show_settings,
                help="Show the settings that NAME=VALUE can be, and exit.",
            )
        )

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        words = tuple(args)  # click removes what it has read from `args`
        if not {"-h", "--help"}.isdisjoint(words):
            ctx.meta[_NAMED_RECIPE] = self._named_recipe(ctx, args)
        try:
            return super().parse_args(ctx, args)
        except click.NoSuchOption as error:
            raise UsageError(self._unknown_option(ctx, error.option_name, words)) from None

    def _unknown_option(self, ctx: click.Context, option: str, words: Sequence[str]) -> str:
        """Return what to write instead of an option that does not exist, such as `--lr 0.1`.

        Args:
            ctx: The context of the command.
            option: The option, as click names it: `-l` if `-lr` was given.
            words: The command line.
        """
        from launcher.recipe.catalogue import CALLS
        from launcher.recipe.foreign_names import hint_for_unknown
        from launcher.recipe.recipe import setting_types

        named = option
        option, value = _option_as_given(named, words)
        names = [*setting_types(), *CALLS, *self._parameters_named(words)]
        known = [name for item in self.params for name in item.opts if name.startswith("--")]
        name = option.lstrip("-").replace("-", "_").lower()
        if name in names:
            assignment = shlex.quote(f"{name}={value}") if value else f"{name}=VALUE"
            hint = f" Write {assignment}."
        elif self._function is not None and not _options_of_run().isdisjoint((option, named)):
            hint = f" `launcher run` has this option: launcher run {ctx.command_path} {named} ..."
        else:
            hint = hint_for_unknown(option, [*known, *names], value)
        hint = hint or f" `{ctx.command_path} --help` lists the options."
        return (
            f"There is no option {option}. Settings and parameters of a recipe are written "
            f"NAME=VALUE.{hint}"
        )

    def _parameters_named(self, words: Sequence[str]) -> list[str]:
        """Return the parameters of the recipe that a command line names."""
        if self._function is not None:
            return list(inspect.signature(self._function).parameters)
        return next(filter(None, map(parameter_names, words)), []) if self._takes_recipe() else []

    def _named_recipe(self, ctx: click.Context, args: list[str]) -> str | None:
        """Return the argument RECIPE of a command line that asks for help."""
        if not self._takes_recipe():
            return None
        try:
            values, _, _ = self.make_parser(ctx).parse_args(list(args))
        except click.ClickException:
            return None
        recipe = values.get("recipe")
        return recipe if isinstance(recipe, str) else None

    def format_epilog(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        from launcher.recipe.resolve import resolve

        function, recipe = self._function, ctx.meta.get(_NAMED_RECIPE)
        if function is None and recipe is not None:
            try:
                function = resolve(recipe).function
            except LauncherError as error:
                formatter.write_paragraph()
                reason = str(error).partition(". ")[0]
                formatter.write_text(f"The parameters of {recipe} are not shown: {reason}.")
        needs_name = function is None and self._takes_recipe()
        has_parameters = function is not None and _write_parameters(function, formatter)
        formatter.write_paragraph()
        formatter.write_text(
            "NAME=VALUE is a setting, which `launcher settings` and --help-settings list"
            + (", or a parameter of the recipe" if has_parameters or function is None else "")
            + (f"; `{ctx.command_path} RECIPE --help` lists those." if needs_name else ".")
        )
        super().format_epilog(ctx, formatter)

    def _takes_recipe(self) -> bool:
        return any(parameter.name == "recipe" for parameter in self.params)


def _option_as_given(option: str, words: Sequence[str]) -> tuple[str, str | None]:
    """Return an option and its value as they stand on the command line.

    Args:
        option: The option, as click names it: `-l` if `-lr` was given.
        words: The command line.
    """
    for word, following in zip(words, [*words[1:], "-"], strict=True):
        given, equals, value = word.partition("=")
        if given == option or (option[1:2] != "-" and word.startswith(option)):
            follows = not following.startswith("-") and not re.match(r"\w+=", following)
            return given, value if equals else following if follows else None
    return option, None


def _options_of_run() -> set[str]:
    from launcher.cli.run import command

    return {name for parameter in command.params for name in parameter.opts}


def _show_settings(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    from launcher.console.settings_table import settings_text

    if value and not ctx.resilient_parsing:
        echo(settings_text())
        ctx.exit()


def _write_parameters(function: Callable[..., Recipe], formatter: click.HelpFormatter) -> bool:
    """Write the parameters of a recipe function, and return whether it has any."""
    from launcher.recipe.parameters import parameters_of

    entries = []
    for parameter in parameters_of(function):
        value = "..." if parameter.default is None else parameter.default
        words = parameter.type_words or "not annotated"
        if parameter.default is None:
            words += ", required"
        meaning = parameter.sentence
        entries.append((f"{parameter.name}={value}", f"{meaning} ({words})".strip()))
    if entries:
        with formatter.section(f"Parameters of {function.__name__}() (NAME=VALUE)"):
            formatter.write_dl(entries)
    return bool(entries)
