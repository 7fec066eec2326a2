"""Whether tensor_parallel can split the layers of a recipe's model, without its values."""

from __future__ import annotations

from launcher.engine.backends.parallel_plan import find_styles
from launcher.engine.training.initial_model import try_to_defer
from launcher.recipe.recipe import Recipe


def check_layer_split(recipe: Recipe) -> None:
    """Refuse a model whose layers `Recipe.tensor_parallel` ranks cannot share.

    A model that cannot be built without its values is not checked; the ranks check every model.

    Raises:
        RecipeError: The model has no plan, the plan does not fit it, or the number of ranks does
            not divide a width or a number of heads.
    """
    built = try_to_defer(recipe)
    if not isinstance(built, str):
        find_styles(built[0], recipe.tensor_parallel_plan, recipe.tensor_parallel)
