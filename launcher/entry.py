"""`main(recipe)`: what a recipe's file does when it is run, by Python or by any launcher."""

from __future__ import annotations

from collections.abc import Callable

from launcher.recipe.recipe import Recipe


def main(recipe: Callable[..., Recipe]) -> None:
    """Train `recipe` in this process, as the rank that the environment says it is.

    Put it under `if __name__ == "__main__":` of a recipe's file. The file then works with
    `python`, `torchrun` and `accelerate launch`, and takes `name=value` arguments. It comes last:
    a rank among several ends its process here.

    Args:
        recipe: The recipe function.
    """
    from launcher.cli.standalone import run_standalone

    run_standalone(recipe)
