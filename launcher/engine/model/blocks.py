"""The blocks of a model: the layers that repeat.

They are what is sharded, compiled and recomputed as one. Compiling a block compiles it once for all
its copies, and leaves the gaps between blocks where gradients are sent while others are computed.
"""

from __future__ import annotations

import contextlib
import functools
from collections import Counter
from collections.abc import Iterable
from contextlib import AbstractContextManager

from torch import nn
from torch.utils.checkpoint import checkpoint

from launcher.engine.model.batch_norm import frozen
from launcher.errors import RecipeError


def find_blocks(model: nn.Module, names: str | None) -> list[nn.Module]:
    """Return the outermost blocks of `model`, in its order; none where nothing repeats.

    Args:
        model: The model.
        names: Class names, comma-separated; None takes those that a Hugging Face model declares,
            or else the classes that come several times in a `ModuleList` or `Sequential` and are
            made of several layers.

    Raises:
        RecipeError: The model has no module of a class that was named.
    """
    present = {type(module).__name__ for module in model.modules()}
    if names is None:
        declared = present.intersection(getattr(model, "_no_split_modules", None) or ())
        return _outermost(model, declared or _repeated(model))
    asked = {name.strip() for name in names.split(",")}
    if missing := sorted(asked - present):
        raise RecipeError(
            f"blocks={names}: the model has no module of class {' or '.join(missing)}. Its modules "
            f"are of {', '.join(sorted(present))}."
        )
    return _outermost(model, asked)


def checkpoint_activations(blocks: Iterable[nn.Module]) -> None:
    """Have each block compute its activations again in backward (arXiv:1604.06174).

    The second time, BatchNorm leaves its running statistics alone.
    """
    for block in blocks:
        block.forward = functools.partial(
            checkpoint,
            block.forward,
            use_reentrant=False,
            context_fn=functools.partial(_contexts, block),
            determinism_check="none",  # ZeRO-3 shows weights as empty outside of their use
        )


def compile_blocks(model: nn.Module, blocks: list[nn.Module]) -> None:
    """Compile each block in place, or the whole model where there are none."""
    for module in blocks or [model]:
        module.compile()


def _contexts(
    block: nn.Module,
) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Return what the first and the second computation of a block run in."""
    return contextlib.nullcontext(), frozen(block.modules())


def _repeated(model: nn.Module) -> set[str]:
    """Return the names of classes that repeat in a container and are made of several layers."""
    found = set()
    for container in model.modules():
        if isinstance(container, (nn.ModuleList, nn.Sequential)):
            counted = Counter(type(module).__name__ for module in container)
            found |= {
                type(module).__name__
                for module in container
                if counted[type(module).__name__] > 1 and any(module.children())
            }
    return found - {nn.Sequential.__name__, nn.ModuleList.__name__}


def _outermost(model: nn.Module, names: set[str]) -> list[nn.Module]:
    found = []
    for child in model.children():
        if type(child).__name__ in names:
            found.append(child)
        else:
            found += _outermost(child, names)
    return found
