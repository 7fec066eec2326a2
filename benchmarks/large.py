"""Recipe with a model of a given size, whose ranks note how much memory they need."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import Data, Recipe, constant, main, sgd
from launcher.json_file import encode_json

if TYPE_CHECKING:
    from torch import Tensor, nn

WIDTH = 1024
"""The width of a block of 4 MiB of weights times two."""

BLOCK_BYTES = 2 * 4 * WIDTH * WIDTH


def large(
    *,
    out: str = os.devnull,
    mib: int = 1024,
    recorded: bool = True,
    limit_mib: int | None = None,
) -> Recipe:
    """Three steps of a model of blocks of 8 MiB.

    Args:
        out: Folder to which each rank writes `rank<N>.json`.
        mib: Size of the weights in MiB.
        recorded: Whether the model function can be recorded. Otherwise it reads a random number, so
            that each rank builds the whole model in its turn.
        limit_mib: Memory in MiB that a rank may allocate once it begins to build the model.
    """
    return Recipe(
        name="large",
        model=lambda: build_model(mib, recorded=recorded, limit_mib=limit_mib),
        data=build_data,
        loss=squared,
        forward=lambda net, batch: forward(net, batch, Path(out)),
        optimizer=sgd(momentum=0.0),
        schedule=constant(),
        batch_size=4,
        lr=0.01,
        lr_batch_size=4,
        steps=3,
        train_samples=12,
        num_workers=0,
        device="cpu",
    )


def build_data() -> Data:
    """Return twelve samples."""
    import torch
    from torch.utils.data import TensorDataset

    return Data(train=TensorDataset(torch.ones(12, WIDTH), torch.zeros(12)))


def build_model(mib: int, *, recorded: bool, limit_mib: int | None) -> nn.Module:
    """Return blocks of two layers, whose size is a multiple of 8 MiB."""
    import torch
    from torch import nn

    class Block(nn.Module):
        """Two layers with a shortcut."""

        def __init__(self) -> None:
            super().__init__()
            self.one = nn.Linear(WIDTH, WIDTH, bias=False)
            self.two = nn.Linear(WIDTH, WIDTH, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = x + 0.01 * self.two(self.one(x).relu())
            return out

    _begin(limit_mib)
    net = nn.Sequential(*(Block() for _ in range(mib * 2**20 // BLOCK_BYTES)))
    if not recorded:
        float(torch.rand(()))
    return net


def forward(net: nn.Module, batch: tuple[Tensor, Tensor], out: Path) -> Tensor:
    """Return the outputs, and write how much memory this process has needed so far."""
    _note(out)
    outputs: Tensor = net(batch[0])
    return outputs


def squared(outputs: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the summed squares and the number of samples."""
    return (outputs.mean(1) - batch[1]).square().sum(), len(batch[1])


_before: list[int] = []
"""The resident memory of this process when the model function was first called."""

_notes: list[int] = []


def _begin(limit_mib: int | None) -> None:
    """Set the high-water mark of memory back to what is used now, and limit what may be added."""
    if _before:  # the model function is called again
        return
    _before.append(_status("VmRSS"))
    Path("/proc/self/clear_refs").write_text("5")
    if limit_mib is not None:
        limit = _status("VmData") + limit_mib * 2**20
        resource.setrlimit(resource.RLIMIT_DATA, (limit, resource.RLIM_INFINITY))


def _note(out: Path) -> None:
    """Write the memory needed so far, before the first step and after each of the others.

    After two steps the limit ends.
    """
    _notes.append(_status("VmHWM") - _before[0])
    if len(_notes) == 3:
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
    if out.is_dir():
        rank = os.environ.get("RANK", "0")
        (out / f"rank{rank}.json").write_text(encode_json({"built": _notes[0], "peak": _notes[-1]}))


def _status(field: str) -> int:
    """Return a line of /proc/self/status in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}.")


if __name__ == "__main__":
    main(large)
