"""Models that are compiled with torch.compile: what tells them, and their names without it."""

from __future__ import annotations

from torch import nn
from torch._dynamo import OptimizedModule

_WRAPPED = "_orig_mod."
"""What torch.compile puts in front of the names inside a module that it wraps."""


def plain_name(name: str) -> str:
    """Return the name that a parameter or buffer has where its module is not compiled."""
    return name.replace(_WRAPPED, "")


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or a part of it is compiled, by a setting or by the recipe."""
    return any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None  # noqa: SLF001
        for module in model.modules()
    )
