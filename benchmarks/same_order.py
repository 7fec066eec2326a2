"""Run a training script with launcher's order of samples, and record its losses.

    python benchmarks/same_order.py SCRIPT LOSSES.json

The script is run as it is. Only the samplers that shuffle take the order of `launcher run` with
seed 0, and `cross_entropy` notes each training loss. With several processes, each writes its
losses to LOSSES.json with its rank appended.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.data import DistributedSampler, RandomSampler

from launcher.engine.data.order import GlobalOrder, look_up
from launcher.json_file import encode_json

SEED = 0


def order(size: int, epoch: int) -> list[int]:
    """Return the samples of an epoch in the order of launcher."""
    return look_up(GlobalOrder(size, SEED), epoch, [range(size)])[0]


def use_order() -> None:
    """Let the samplers of PyTorch and Accelerate take the samples in the order of launcher."""
    from accelerate.data_loader import SeedableRandomSampler

    def shuffled(sampler: Any) -> Iterator[int]:
        epochs = sampler.__dict__.setdefault("_epochs_so_far", itertools.count())
        return iter(order(len(sampler.data_source), next(epochs)))

    def share(sampler: Any) -> Iterator[int]:
        samples = order(len(sampler.dataset), sampler.epoch)
        return iter(samples[sampler.rank :: sampler.num_replicas])

    for kind, replaced in (
        (RandomSampler, shuffled),
        (SeedableRandomSampler, shuffled),
        (DistributedSampler, share),
    ):
        kind.__iter__ = replaced  # type: ignore[method-assign]


def record_losses() -> list[float]:
    """Return a list that receives each loss that `cross_entropy` computes in training."""
    losses: list[float] = []
    original = functional.cross_entropy

    def recorded(*arguments: Any, **options: Any) -> Tensor:
        loss = original(*arguments, **options)
        if torch.is_grad_enabled():
            losses.append(loss.item())
        return loss

    functional.cross_entropy = recorded
    return losses


def main() -> None:
    """Run the script that the command line names."""
    script, file = Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve()
    use_order()
    losses = record_losses()
    sys.path.insert(0, str(script.parent))
    code = compile(script.read_text(), script, "exec")
    exec(code, {"__name__": "__main__", "__file__": str(script)})  # Lightning starts sys.argv again
    rank = os.environ.get("LOCAL_RANK", "0")
    file.with_name(f"{file.name}.{rank}").write_text(encode_json(losses))


if __name__ == "__main__":
    main()
