"""`launcher new`: a recipe of one's own to start from."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="Start a recipe from another.")
@click.argument("name")
@click.option("--from", "source", default="digits", show_default=True, metavar="RECIPE")
def command(name: str, source: str) -> None:
    """Copy a recipe to NAME.py, as a starting point that runs at once.

    \b
    launcher new mine
    launcher new recipes/mine.py --from gpt
    """
    from launcher.recipe.resolve import resolve
    from launcher.recipe.scaffold import copy_recipe

    target = Path(name if name.endswith(".py") else f"{name}.py")
    copy_recipe(resolve(source), target)
    click.echo(
        f"{target}: a copy of {source}. `launcher check {target}` tries it out, `launcher run "
        f"{target}` trains it."
    )
