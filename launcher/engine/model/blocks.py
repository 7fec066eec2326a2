"""The blocks of a model: its repeated layers.

A block is the unit of sharding, compilation and activation recomputation. Compiling block by block
compiles all copies of a block once, and keeps the boundaries between blocks, at which DDP can
all-reduce gradients while the backward pass continues.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.checkpoint import checkpoint

from launcher.engine.model.batch_norm import frozen
from launcher.engine.state.compiled import is_compiled
from launcher.errors import RecipeError


def find_blocks(model: nn.Module, names: str | None) -> list[nn.Module]:
    """Return the outermost blocks of `model`, in module order; none if no layer repeats.

    Args:
        model: The model.
        names: Comma-separated class names. None selects the classes that a Hugging Face model
            declares, or else the classes that occur several times in a `ModuleList` or `Sequential`
            and have children.

    Raises:
        RecipeError: The model has no module of a class in `names`.
    """
    present = {type(module).__name__ for module in model.modules()}
    if names is None:
        declared = present.intersection(getattr(model, "_no_split_modules", None) or ())
        return _outermost(model, declared or _repeated(model))
    requested = {name.strip() for name in names.split(",")}
    if missing := sorted(requested - present):
        raise RecipeError(
            f"blocks={names}: the model has no module of class {' or '.join(missing)}. Name "
            f"classes of its modules: {', '.join(sorted(present))}."
        )
    return _outermost(model, requested)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Make each block recompute its activations in the backward pass (arXiv:1604.06174).

    The recomputation does not update the running statistics of BatchNorm.

    Raises:
        RecipeError: A block is compiled and has BatchNorm. The compiler would make other code for
            the recomputation, which must not update the statistics.
    """
    for block in blocks:
        if is_compiled(block) and any(isinstance(m, _BatchNorm) for m in block.modules()):
            raise RecipeError(
                f"compile=true and activation_checkpointing=true: the blocks of class "
                f"{type(block).__name__} have BatchNorm, and what is compiled cannot be recomputed "
                "without updating its statistics again. Remove one of the two settings."
            )
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=functools.partial(_contexts, block),
            determinism_check="none",  # ZeRO-3 shows weights as empty when they are not in use
        )


def compile_blocks(model: nn.Module, blocks: list[nn.Module], *, exact: bool = False) -> None:
    """Compile the forward of each block, or of the whole model if there are no blocks.

    Hooks of the blocks, such as those with which FSDP gathers weights, stay outside.

    Args:
        model: The model.
        blocks: Its blocks.
        exact: Whether an input must be computed by the same kernels whatever inputs came before.
            By default the compiler specialises in the first shape that it sees.
    """
    for module in blocks or [model]:
        _compile_forward(module, dynamic=True if exact else None)


def _compile_forward(module: nn.Module, *, dynamic: bool | None) -> None:
    """Replace the forward of a module by its compiled version.

    The compiler skips functions of torch itself, such as the forward of `TransformerEncoderLayer`,
    but not when they are called by another function.
    """
    forward = module.forward

    @functools.wraps(forward)
    def call(*args: Any, **kwargs: Any) -> Any:
        return forward(*args, **kwargs)

    module.forward = torch.compile(call, dynamic=dynamic)


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return the contexts for the first computation of a block and for its recomputation."""
    return contextlib.nullcontext(), frozen(block.modules())


def _repeated(model: nn.Module) -> set[str]:
    """Return the names of classes that repeat in a container and have children."""
    repeated = set()
    for container in model.modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            counts = Counter(type(module).__name__ for module in container)
            repeated |= {
                type(module).__name__
                for module in container
                if counts[type(module).__name__] > 1 and any(module.children())
            }
    return repeated - {nn.Sequential.__name__, nn.ModuleList.__name__}


def _outermost(model: nn.Module, names: set[str]) -> list[nn.Module]:
    """Return the modules of the named classes that are not inside another such module."""
    modules = []
    for child in model.children():
        if type(child).__name__ in names:
            modules.append(child)
        else:
            modules += _outermost(child, names)
    return modules
