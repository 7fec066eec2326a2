"""`launcher recipes`: what there is to train."""

from __future__ import annotations

import click


@click.command(short_help="List what there is to train.")
def command() -> None:
    """List the recipes in ./recipes and those that launcher ships, a line each.

    \b
    launcher recipes
    """
    from launcher.recipe.resolve import known_recipes

    names = known_recipes()
    width = max(map(len, names), default=0)
    for name, sentence in names.items():
        click.echo(f"{name:<{width}}  {sentence}")
