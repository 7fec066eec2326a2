"""Models compiled with torch.compile: how to recognise them, and the original tensor names."""

from __future__ import annotations

from torch import nn
from torch._dynamo import OptimizedModule

_WRAPPED = "_orig_mod."
"""The prefix that torch.compile adds to the names inside a module that it wraps."""


def plain_name(name: str) -> str:
    """Return the name that a parameter or buffer has in the uncompiled module."""
    return name.replace(_WRAPPED, "")


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or one of its modules is compiled, by whatever means."""
    return any(
        isinstance(module, OptimizedModule) or module._compiled_call_impl is not None  # noqa: SLF001
        for module in model.modules()
    )
