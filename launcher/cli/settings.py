"""`launcher settings`: list the settings of recipes."""

from __future__ import annotations

import click

from launcher.cli.completing import complete_setting_names
from launcher.console.echo import echo


@click.command(short_help="List the settings of recipes: NAME=VALUE.")
@click.argument("names", nargs=-1, metavar="[NAME]...", shell_complete=complete_setting_names)
def command(names: tuple[str, ...]) -> None:
    """List the settings of recipes, or show those called NAME.

    Each has its type, its default, a sentence, and what it affects: the samples of each step, the
    updates of the weights, the execution, the loading of data, or nothing about the training.

    \b
    launcher settings
    launcher settings lr schedule
    """
    from launcher.console.settings_table import setting_text, settings_text
    from launcher.recipe.catalogue import find_setting

    if names:
        echo("\n\n".join(setting_text(find_setting(name)) for name in names))
    else:
        echo(settings_text())
