"""`launcher find`: measure what a recipe should be set to."""

from __future__ import annotations

import click

from launcher.cli.group import LazyGroup


@click.group(
    cls=LazyGroup,
    modules={name: f"launcher.cli.find.{name}" for name in ("batch", "loader", "lr", "noise")},
    short_help="Measure what a recipe should be set to.",
)
def command() -> None:
    """Measure on the ranks at hand what a recipe should be set to.

    \b
    launcher find lr digits           the learning rate, by a range test
    launcher find loader digits       the DataLoader workers that are worth it
    launcher find batch digits        the micro-batch that fits, and the fastest
    launcher find noise digits        how large a batch is worth its samples
    """
