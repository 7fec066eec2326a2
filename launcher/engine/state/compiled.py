"""Models compiled with torch.compile: how to recognise them, and the original tensor names."""

from __future__ import annotations

import functools
import os
from typing import Any

from torch import nn
from torch._dynamo import OptimizedModule

_WRAPPED = "_orig_mod."
"""The prefix that torch.compile adds to the names inside a module that it wraps."""

_COMPILED = "_torchdynamo_orig_callable"
"""An attribute of functions that torch.compile returns."""

_MAX_WORKERS = 32
"""The number that torch starts on a machine with at least as many cores."""


def limit_compile_workers(num_cores: int) -> None:
    """Let torch.compile start no more processes in this rank than it has cores.

    torch starts up to 32 in each process, whatever other ranks do (torch 2.13). It has read the
    variable TORCHINDUCTOR_COMPILE_THREADS, if that is set, when the settings were imported, which
    in a forked rank was before the fork.

    Args:
        num_cores: The cores of this rank. The variable has precedence.
    """
    from torch._inductor import config

    if "TORCHINDUCTOR_COMPILE_THREADS" not in os.environ:
        config.compile_threads = min(num_cores, _MAX_WORKERS)


def plain_name(name: str) -> str:
    """Return the name that a parameter or buffer has in the uncompiled module."""
    return name.replace(_WRAPPED, "")


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model or one of its modules is compiled, by whatever means."""
    return any(
        isinstance(module, OptimizedModule)
        or module._compiled_call_impl is not None  # noqa: SLF001
        or _holds_compiled(module.forward)
        for module in model.modules()
    )


def _holds_compiled(forward: Any) -> bool:
    """Return whether a forward is compiled, or recomputes what a compiled function computes."""
    called = getattr(forward, "args", ()) if isinstance(forward, functools.partial) else ()
    return any(hasattr(function, _COMPILED) for function in (forward, *called))
