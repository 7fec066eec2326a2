"""Products of linear layers in fp8, by torchao."""

from __future__ import annotations

from torch import nn

from launcher.errors import RecipeError

_MULTIPLE = 16
"""Sizes of matrices are multiples of this where GPUs multiply them in fp8."""


def compute_in_fp8(model: nn.Module) -> None:
    """Let the linear layers of a model multiply in fp8, in place; weights stay as they are.

    Each tensor is scaled by its largest magnitude in every product. Frozen layers, layers whose
    sizes fp8 does not take, and the last linear layer, which is usually the head, stay as they are.

    Raises:
        RecipeError: No layer is left.
    """
    names = set(fp8_layers(model))
    if not names:
        raise RecipeError(
            "fp8=true computes in fp8 the linear layers, but for the last one, whose sizes are "
            f"multiples of {_MULTIPLE}, and the model has none. Leave fp8 out."
        )
    from torchao.float8 import convert_to_float8_training

    convert_to_float8_training(model, module_filter_fn=lambda _, name: name in names)


def fp8_layers(model: nn.Module) -> list[str]:
    """Return the names of the linear layers that can compute in fp8."""
    layers = [(name, layer) for name, layer in model.named_modules() if type(layer) is nn.Linear]
    return [
        name
        for name, layer in layers[:-1]
        if layer.weight.requires_grad
        and layer.in_features % _MULTIPLE == layer.out_features % _MULTIPLE == 0
    ]
