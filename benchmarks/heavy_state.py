"""Recipe whose state is as large as asked for, and a clock that times each of its steps."""

from __future__ import annotations

import errno
import json
import os
import time
from typing import TYPE_CHECKING, Any

from launcher import CallbackContext, Data, Recipe, adamw

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 1024
"""Neurons in each layer."""

_BYTES_PER_WEIGHT = 12
"""Bytes of a weight and of AdamW's two averages, in fp32."""


class Clock:
    """Writes down when each step began and ended, and when checkpoints were complete."""

    def __init__(self) -> None:
        self._began: list[float] = []
        self._ended: list[float] = []

    def before_step(self, context: CallbackContext) -> None:
        """Take the time before a step."""
        del context
        self._began.append(time.perf_counter())

    def after_step(self, context: CallbackContext) -> None:
        """Take the time after a step, before a checkpoint is saved."""
        del context
        self._ended.append(time.perf_counter())

    def on_run_end(self, context: CallbackContext) -> None:
        """Write the times to a file in the run folder."""
        times = list(zip(self._began, self._ended, strict=True))
        (context.run_dir / "times.json").write_text(json.dumps(times))


def heavy_state(
    *, state_mb: int = 100, saves: int = 3, every: int = 10, writer: str = ""
) -> Recipe:
    """Return a recipe whose checkpoints have `state_mb` megabytes.

    Args:
        state_mb: Megabytes of weights and optimizer state.
        saves: Number of checkpoints while the run trains; one more follows at its end.
        every: Steps from one to the next.
        writer: What writes checkpoints, if it is "thread"; by default the process does.
    """
    if writer == "thread":
        _refuse_processes()
    layers = max(round(state_mb * 1e6 / _BYTES_PER_WEIGHT / WIDTH**2), 1)
    return Recipe(
        name="heavy_state",
        model=lambda: build_model(layers),
        data=build_data,
        loss=lambda outputs, batch: (outputs.square().sum(), len(batch)),
        forward=lambda model, batch: model(batch),
        count=len,
        batch_size=32,
        lr=1e-4,
        lr_batch_size=32,
        steps=(saves + 1) * every,
        optimizer=adamw(),
        checkpoint_every=every,
        keep_checkpoints=1,
        callbacks=(Clock(),),
        num_workers=0,
        device="cpu",
    )


def build_model(layers: int) -> nn.Module:
    """Return a net that maps vectors of WIDTH numbers to such vectors, computed in one thread."""
    import torch
    from torch import nn

    torch.set_num_threads(1)

    class Block(nn.Module):
        """Adds to its input, so that numbers stay far from zero: small ones are slow on CPUs."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, vectors: Tensor) -> Tensor:
            moved: Tensor = self.linear(vectors).tanh()
            return vectors + moved

    return nn.Sequential(*(Block() for _ in range(layers)))


def build_data() -> Data:
    """Return vectors of random numbers."""
    import torch

    vectors: list[Tensor] = list(torch.randn(64, WIDTH, generator=torch.Generator().manual_seed(0)))
    return Data(train=vectors)


def _refuse_processes() -> None:
    """Let checkpoints be written as where no process can be started: by a thread."""
    from launcher.engine.saving import shard_writer

    def refuse(*_: Any) -> Any:
        raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))

    shard_writer.ShardWriter.process = refuse  # type: ignore[assignment,method-assign]
