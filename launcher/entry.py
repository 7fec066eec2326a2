"""`main(recipe)`: what a recipe's file calls when it is run by Python or by a launcher."""

from __future__ import annotations

from collections.abc import Callable

from launcher.recipe.recipe import Recipe


def main(recipe: Callable[..., Recipe]) -> None:
    """Train `recipe` in this process, as the rank that the environment describes.

    Call it under `if __name__ == "__main__":` at the end of a recipe's file. The file then runs
    under `python`, `torchrun` and `accelerate launch`, and takes `name=value` arguments. It may not
    return: a rank among several ends its process here.

    Args:
        recipe: The recipe function.
    """
    from launcher.cli.standalone import run_standalone

    run_standalone(recipe)
