"""`launcher new`: write a recipe to start your own from."""

from __future__ import annotations

from pathlib import Path

import click

from launcher.cli.completing import complete_recipes
from launcher.console.echo import echo


@click.command(short_help="Write a recipe to start your own from.")
@click.argument("name")
@click.option(
    "--from",
    "source",
    metavar="RECIPE",
    shell_complete=complete_recipes,
    help="Copy the file of this recipe. Default: a small, commented recipe that trains at once.",
)
def command(name: str, source: str | None) -> None:
    """Write the recipe NAME to NAME.py, a starting point that runs as it is.

    \b
    launcher new mine
    launcher new recipes/mine.py --from gpt
    """
    from launcher.recipe.resolve import resolve
    from launcher.recipe.scaffold import copy_recipe, new_recipe

    target = Path(name if name.endswith(".py") else f"{name}.py")
    recipe = str(target)
    if source is None:
        new_recipe(target)
    else:
        reference = resolve(source)
        copy_recipe(reference, target)
        recipe += f":{reference.function.__name__}"
    echo(
        f"Wrote {target}. Check the recipe with `launcher check {recipe}`, train it with "
        f"`launcher run {recipe}`."
    )
