"""The modules that DeepSpeed imports with the first ZeRO optimizer of a process.

DeepSpeed asks there whether the optimizer is its own Muon. Ranks that are forked from a process
that has imported this module find these modules imported. Importing them prepares no torch.compile.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from deepspeed.runtime import compiler

_MODULES = (
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "deepspeed.comm.mori",
)


@contextlib.contextmanager
def _compiling_late() -> Iterator[None]:
    """Let functions that DeepSpeed decorates with torch.compile in this context be compiled late.

    They are compiled when they are called for the first time. Preparing torch.compile takes almost
    as long as importing torch, and the functions of DeepSpeed's Muon serve that optimizer alone.
    """
    before = getattr(compiler, "compile", None)
    if before is None:  # another version of DeepSpeed
        yield
        return
    compiler.compile = lambda: _compiled_late
    try:
        yield
    finally:
        compiler.compile = before


def _compiled_late(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that compiles `function` when it is called for the first time."""

    @functools.cache
    def compiled() -> Callable[..., Any]:
        result: Callable[..., Any] = torch.compile(function)
        return result

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return compiled()(*args, **kwargs)

    return call


with _compiling_late():
    for _module in _MODULES:
        with contextlib.suppress(ImportError):  # another version of DeepSpeed
            importlib.import_module(_module)
