"""Which modules of a model tensor parallelism splits, and how: found, named and checked.

A plan maps names of modules to styles (`launcher.recipe.function_checks.PARALLEL_STYLES`), with a
`*` for each number of a layer. It is the recipe's, or that of a transformers model. Everything here
works on a model on the meta device as well, because only shapes are read.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import nn

from launcher.errors import RecipeError
from launcher.printable import kind_of
from launcher.recipe.function_checks import PARALLEL_STYLES

_SPLIT_KINDS = (nn.Linear, nn.Embedding)
_MAX_NAMES = 12
"""Number of names that an error lists."""

UNSPLIT = ("replicate", "replicated_with_grad_allreduce")
"""The styles of modules that every rank has whole."""

_HEAD_COUNTS = (
    *("num_attention_heads", "num_key_value_heads", "num_heads", "num_kv_heads"),
    *("n_heads", "n_head", "n_kv_heads", "heads"),
)
"""Names of numbers of heads in attention modules and in configurations of transformers."""


def find_styles(model: nn.Module, plan: Mapping[str, str] | None, size: int) -> dict[str, str]:
    """Return the styles of a model by the names of its modules, checked.

    Args:
        model: The recipe's model.
        plan: `Recipe.tensor_parallel_plan`; None takes the plan of a transformers model in it.
        size: The number of ranks that share a layer.

    Raises:
        RecipeError: There is no plan, it names modules that the model does not have, a module or
            style cannot be split, or `size` does not divide a width or a number of heads.
    """
    asked = f"tensor_parallel={size}"
    patterns = _plan_of_transformers(model) if plan is None else dict(plan)
    if not patterns:
        raise RecipeError(
            f"{asked} splits the layers of the model, and the recipe does not say how. Give "
            "Recipe(tensor_parallel_plan={...}), which maps names of modules to styles, such as "
            "{'blocks.*.up': 'colwise', 'blocks.*.down': 'rowwise'}, or use a transformers model "
            "that has a plan of its own. Otherwise leave tensor_parallel out."
        )
    modules = dict(model.named_modules())
    styles: dict[str, str] = {}
    for pattern, style in patterns.items():
        names = [name for name in modules if _matches(pattern, name)]
        if plan is not None and not names:
            raise RecipeError(
                f"{asked}: the tensor_parallel_plan names {pattern}, and the model has no such "
                f"module. Its modules are {_listed(modules)}."
            )
        if plan is None and not names and _names_parameter(model, pattern):
            names, modules[pattern] = [pattern], model
        for name in names:
            _check_style(name, modules[name], style, asked)
            styles[name] = style
    if not any(style not in UNSPLIT for style in styles.values()):
        raise RecipeError(
            f"{asked}: the plan splits no module of the model, whose modules are "
            f"{_listed(modules)}."
        )
    for name, style in styles.items():
        _check_widths(name, modules[name], style, size)
    for name in dict.fromkeys(
        name.rpartition(".")[0] for name, style in styles.items() if style == "colwise"
    ):
        _check_heads(name, modules[name], size)
    return styles


def _plan_of_transformers(model: nn.Module) -> dict[str, str]:
    """Return the plans of the outermost transformers models in a model, under their full names."""
    plans: dict[str, str] = {}
    found: list[str] = []
    for prefix, module in model.named_modules():
        if any(not outer or prefix.startswith(f"{outer}.") for outer in found):
            continue
        plan = getattr(module, "tp_plan", None) or getattr(module, "_tp_plan", None)
        if isinstance(plan, Mapping) and plan:
            found.append(prefix)
            plans |= {f"{prefix}.{name}" if prefix else name: style for name, style in plan.items()}
    return plans


def _matches(pattern: str, name: str) -> bool:
    """Return whether a name is that of a pattern, in which * stands for one part of a name."""
    return re.fullmatch(re.escape(pattern).replace(r"\*", r"[^.]+"), name) is not None


def _names_parameter(model: nn.Module, pattern: str) -> bool:
    return any(_matches(pattern, name) for name, _ in model.named_parameters())


def _listed(modules: Mapping[str, nn.Module]) -> str:
    """Return the names of the modules that can be split, with * for numbers, as text."""
    splittable = (name for name, module in modules.items() if isinstance(module, _SPLIT_KINDS))
    names = list(dict.fromkeys(re.sub(r"(?<=\.)\d+(?=\.|$)", "*", name) for name in splittable))
    more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
    return ", ".join(names[:_MAX_NAMES]) + more if names else "neither Linear nor Embedding"


def _check_style(name: str, module: nn.Module, style: str, asked: str) -> None:
    """Refuse a style that is unknown, or that is for another kind of module.

    Raises:
        RecipeError: It is.
    """
    if style not in PARALLEL_STYLES:
        raise RecipeError(
            f"{asked}: the model's own plan has the style {style} for {name}, which launcher does "
            f"not implement. It implements {', '.join(PARALLEL_STYLES)}. Give another "
            "Recipe(tensor_parallel_plan={...}), or leave tensor_parallel out."
        )
    kinds: tuple[type[nn.Module], ...] = _SPLIT_KINDS
    if style.startswith("embedding_"):
        kinds = (nn.Embedding,)
    weights = {key for key, _ in module.named_parameters()}
    if style not in UNSPLIT and not (isinstance(module, kinds) and weights <= {"weight", "bias"}):
        raise RecipeError(
            f"{asked}: the plan has the style {style} for {name}, which is for "
            f"{' and '.join(kind.__name__ for kind in kinds)}, and the module is "
            f"{kind_of(module)}. Leave it out of the plan, and every rank has it whole."
        )


def _check_widths(name: str, module: nn.Module, style: str, size: int) -> None:
    """Refuse a module whose split side `size` does not divide.

    Raises:
        RecipeError: It does not.
    """
    sides = dict(split_sides(module, style))
    for what, width in sides.items():
        if width % size:
            raise RecipeError(
                f"tensor_parallel={size} splits the {width:,} {what} of {name} ({style}), and "
                f"{width:,} is not a multiple of {size}. Use a tensor_parallel that divides it, "
                f"such as {_divisor(width, size)}, or another width."
            )


def split_sides(module: nn.Module, style: str) -> Iterator[tuple[str, int]]:
    """Yield what a style splits of a module, as (name, number)."""
    if isinstance(module, nn.Linear) and style not in UNSPLIT:
        is_colwise = style.startswith("colwise")
        yield ("outputs", module.out_features) if is_colwise else ("inputs", module.in_features)
    if isinstance(module, nn.Embedding) and style not in UNSPLIT:
        by_rows = style in ("rowwise", "rowwise_rep", "rowwise_split_input", "embedding_rowwise")
        yield ("rows", module.num_embeddings) if by_rows else ("columns", module.embedding_dim)


def _check_heads(name: str, module: nn.Module, size: int) -> None:
    """Refuse an attention module whose heads `size` does not divide.

    The numbers are found by the names that modules and configurations of transformers give them.

    Raises:
        RecipeError: `size` does not divide a number of heads.
    """
    sources: list[object] = [module]
    if hasattr(module, "head_dim"):
        sources.append(getattr(module, "config", None))
    for source in sources:
        for key in _HEAD_COUNTS:
            heads = getattr(source, key, None)
            if isinstance(heads, int) and heads % size:
                raise RecipeError(
                    f"tensor_parallel={size} gives each rank whole attention heads, and {name} has "
                    f"{heads} ({key}), which is not a multiple of {size}. Use a tensor_parallel "
                    f"that divides it, such as {_divisor(heads, size)}."
                )


def _divisor(number: int, below: int) -> int:
    """Return the largest divisor of a number below another one."""
    return next(divisor for divisor in range(below, 0, -1) if number % divisor == 0)
