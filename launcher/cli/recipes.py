"""`launcher recipes`: list the available recipes."""

from __future__ import annotations

import click

from launcher.console.echo import echo


@click.command(short_help="List the available recipes.")
def command() -> None:
    """List the recipes in ./recipes and those that launcher ships.

    \b
    launcher recipes
    """
    from launcher.recipe.resolve import known_recipes

    names = known_recipes()
    width = max(map(len, names), default=0)
    for name, sentence in names.items():
        echo(f"{name:<{width}}  {sentence}")
