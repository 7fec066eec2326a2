"""`launcher recipes`: what there is to train."""

from __future__ import annotations

from pathlib import Path

import click


@click.command(short_help="List what there is to train.")
def command() -> None:
    """List the recipes in ./recipes and those that launcher ships, a line each."""
    from launcher.resolve import BUNDLED, list_recipes

    here = Path("recipes").resolve()
    folders = [here, BUNDLED] if here != BUNDLED and here.is_dir() else [BUNDLED]
    names: dict[str, str] = {}
    for folder in folders:
        for found in list_recipes(folder):
            stem = found.path.stem
            name = stem if found.function == stem else f"{stem}:{found.function}"
            names.setdefault(name, found.sentence)
    width = max(map(len, names), default=0)
    for name, sentence in names.items():
        click.echo(f"{name:<{width}}  {sentence}")
