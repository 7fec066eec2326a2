"""`launcher find`: measure what a recipe should be set to."""

from __future__ import annotations

import click

from launcher.cli.group import LazyGroup


@click.group(
    cls=LazyGroup,
    modules={"lr": "launcher.cli.find.lr", "noise": "launcher.cli.find.noise"},
    short_help="Measure what a recipe should be set to.",
)
def command() -> None:
    """Measure on the ranks at hand what a recipe should be set to.

    \b
    launcher find lr digits           the learning rate, by a range test
    launcher find noise digits        how large a batch is worth its samples
    """
