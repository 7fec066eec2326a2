"""`launcher find`: measure one setting of a recipe."""

from __future__ import annotations

import click

from launcher.cli.group import LazyGroup


@click.group(
    cls=LazyGroup,
    modules={
        name: f"launcher.cli.find.{name}" for name in ("batch", "loader", "lr", "noise", "strategy")
    },
    short_help="Measure one setting: lr, batch, loader, noise or strategy.",
)
def command() -> None:
    """Measure one setting of a recipe on the ranks of this machine.

    \b
    launcher find lr digits           learning rate, by short trainings
    launcher find loader digits       number of DataLoader workers
    launcher find batch digits        largest micro-batch that fits, and the fastest
    launcher find noise digits        gradient noise scale: useful batch size
    launcher find strategy digits     cheapest strategy that fits into memory
    """
