"""`launcher new`: copy a recipe to start your own from."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Copy a recipe to start your own from.")
@click.argument("name")
@click.option(
    "--from",
    "source",
    default="digits",
    show_default=True,
    metavar="RECIPE",
    help="The recipe to copy.",
)
def command(name: str, source: str) -> None:
    """Copy a recipe to NAME.py, a starting point that runs as it is.

    \b
    launcher new mine
    launcher new recipes/mine.py --from gpt
    """
    from launcher.recipe.resolve import resolve
    from launcher.recipe.scaffold import copy_recipe

    target = Path(name if name.endswith(".py") else f"{name}.py")
    copy_recipe(resolve(source), target)
    click.echo(
        f"Copied {source} to {target}. Check it with `launcher check {target}`, train it with "
        f"`launcher run {target}`."
    )
