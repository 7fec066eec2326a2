"""Recipes that are hard to start, because of threads, computation at import, caches or errors."""

from __future__ import annotations

import atexit
import os
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, constant, main

if TYPE_CHECKING:
    from torch import Tensor, nn

LOCK = threading.Lock()


def _hold_lock(acquired: threading.Event) -> None:
    while True:
        with LOCK:
            acquired.set()
            time.sleep(0.05)


if "STARTS_THREAD" in os.environ:
    _acquired = threading.Event()
    threading.Thread(target=_hold_lock, args=[_acquired], name="client", daemon=True).start()
    _acquired.wait()

if "SIGNALLED_AT_END" in os.environ:

    class _Late:
        """A value that signals its process if Python clears the modules, at the very end."""

        def __init__(self, number: int, kill: Callable[[int, int], None] = os.kill) -> None:
            self._number, self._kill, self._process = number, kill, os.getpid()

        def __del__(self) -> None:
            self._kill(self._process, self._number)

    _late = _Late(int(os.environ["SIGNALLED_AT_END"]))
    atexit.register(os.kill, os.getpid(), int(os.environ["SIGNALLED_AT_END"]))

if "COMPUTES" in os.environ:
    import torch

    IMAGES = torch.randn(4096, 64)
    IMAGES = (IMAGES - IMAGES.mean()) / IMAGES.std()  # starts OpenMP's threads


def starting() -> Recipe:
    """A linear model on data in memory."""
    return _recipe(_data, _model)


def locked() -> Recipe:
    """A linear model whose data function needs a lock that a thread usually holds."""
    return _recipe(_locked_data, _model)


def computed() -> Recipe:
    """A linear model on data that were computed at import."""
    return _recipe(_computed_data, _model)


def prepared() -> Recipe:
    """A linear model whose data and model functions each create a cache file if it is missing."""
    return _recipe(lambda: _cached("data", _data), lambda: _cached("model", _model))


def failing() -> Recipe:
    """A linear model whose data function fails on the first rank of each node."""
    return _recipe(_failing_data, _model)


def unsettled() -> Recipe:
    """Return another seed on every rank."""
    return replace(_recipe(_data, _model), seed=int(os.environ.get("RANK", "0")), train_samples=64)


def _recipe(data: Callable[[], Data], model: Callable[[], nn.Module]) -> Recipe:
    return Recipe(
        name="starting",
        model=model,
        data=data,
        loss=_loss,
        batch_size=16,
        lr=0.1,
        lr_batch_size=16,
        epochs=1,
        schedule=constant(),
        in_memory=True,
        hang_timeout={"start": 60.0, "step": 20.0},
    )


def _data() -> Data:
    import torch
    from torch.utils.data import TensorDataset

    return Data(train=TensorDataset(torch.randn(64, 64), torch.randint(3, (64,))))


def _locked_data() -> Data:
    with LOCK:
        return _data()


def _computed_data() -> Data:
    import torch
    from torch.utils.data import TensorDataset

    images = (IMAGES * 2).exp().log() / 2
    return Data(train=TensorDataset(images[:64], torch.randint(3, (64,))))


def _failing_data() -> Data:
    if os.environ.get("LOCAL_RANK") == "0":
        raise OSError("the archive is damaged")
    return _data()


def _cached(name: str, make: Callable[[], Any]) -> Any:
    cache = Path(f"{name}.cache")
    if not cache.exists():
        with cache.open("wb") as file:
            time.sleep(0.5)  # a download
            file.write(bytes(2000))
    num_bytes = cache.stat().st_size
    if num_bytes != 2000:
        raise ValueError(f"the cache has {num_bytes} bytes instead of 2000")
    return make()


def _model() -> nn.Module:
    from torch import nn

    return nn.Linear(64, 3)


def _loss(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


if __name__ == "__main__":
    main(globals()[os.environ.get("RECIPE", "starting")])
