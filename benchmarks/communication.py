"""One rank of DDP, under torchrun: steps with and without communication, and all-reduces alone."""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter

import click
import torch
import torch.distributed as dist
from tiny import build_model
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SIZES = [1 << power for power in range(8, 24, 3)]
"""Bytes of the all-reduces that are timed."""

_TURNS = 15
_IN_A_ROW = 5


@click.command()
@click.option("--width", type=int, required=True)
@click.option("--batch-size", type=int, required=True, help="Of this rank.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(width: int, batch_size: int, out: Path) -> None:
    """Measure, and write it on rank 0."""
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model(Path(os.devnull), 0, 0, width, 2))
    vectors, labels = torch.randn(batch_size, 64), torch.randint(10, (batch_size,))
    loss = nn.CrossEntropyLoss()

    def step() -> None:
        model.zero_grad()
        loss(model(vectors), labels).backward()

    def step_alone() -> None:
        with model.no_sync():
            step()

    def reduce(num_bytes: int) -> Callable[[], None]:
        return functools.partial(dist.all_reduce, torch.ones(num_bytes // 4))

    ways = {"sync": step, "no_sync": step_alone} | {str(size): reduce(size) for size in SIZES}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(_TURNS + 1):
        for name, way in ways.items():
            dist.barrier()
            started = perf_counter()
            for _ in range(_IN_A_ROW):
                way()
            if turn:  # the first is warm-up
                seconds[name].append((perf_counter() - started) / _IN_A_ROW)
    if dist.get_rank() == 0:
        medians = {name: median(values) for name, values in seconds.items()}
        latency, bandwidth = fit(medians, dist.get_world_size())
        num_bytes = sum(4 * weight.numel() for weight in model.parameters())
        said = {
            "sync": medians["sync"],
            "no_sync": medians["no_sync"],
            "num_bytes": num_bytes,
            "latency": latency,
            "bandwidth": bandwidth,
        }
        out.write_text(json.dumps(said))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that ends while they still run


def fit(seconds: dict[str, float], ranks: int) -> tuple[float, float]:
    """Return latency and bandwidth of a ring, 2 (p - 1) alpha + 2 (p - 1) / p n / beta.

    From the smallest message, and from what the largest takes longer.
    """
    messages = 2 * (ranks - 1)
    small, large = SIZES[0], SIZES[-1]
    longer = seconds[str(large)] - seconds[str(small)]
    return seconds[str(small)] / messages, messages / ranks * (large - small) / longer


if __name__ == "__main__":
    main()
