"""Measure one DDP rank: steps with and without communication, and all-reduces alone.

ranks.py starts it with torchrun.
"""

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
"""Message sizes of the timed all-reduces in bytes."""

_NUM_TURNS = 15
_CALLS_PER_TURN = 5


@click.command()
@click.option("--width", type=int, required=True)
@click.option("--batch-size", type=int, required=True, help="Samples per rank.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(width: int, batch_size: int, out: Path) -> None:
    """Measure on all ranks, and write the result on rank 0."""
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

    calls = {"sync": step, "no_sync": step_alone} | {str(size): reduce(size) for size in SIZES}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(_NUM_TURNS + 1):
        for name, call in calls.items():
            dist.barrier()
            started = perf_counter()
            for _ in range(_CALLS_PER_TURN):
                call()
            if turn:  # the first turn is a warm-up
                seconds[name].append((perf_counter() - started) / _CALLS_PER_TURN)
    if dist.get_rank() == 0:
        medians = {name: median(values) for name, values in seconds.items()}
        latency, bandwidth = fit(medians, dist.get_world_size())
        num_bytes = sum(4 * weight.numel() for weight in model.parameters())
        measurements = {
            "sync": medians["sync"],
            "no_sync": medians["no_sync"],
            "num_bytes": num_bytes,
            "latency": latency,
            "bandwidth": bandwidth,
        }
        out.write_text(json.dumps(measurements))
    dist.barrier()
    os._exit(0)  # gloo's threads may abort a process that exits while they still run


def fit(seconds: dict[str, float], ranks: int) -> tuple[float, float]:
    """Return latency in seconds and bandwidth in bytes/s of a ring all-reduce.

    The model is 2 (p - 1) alpha + 2 (p - 1) / p n / beta for p ranks and n bytes. The time of the
    smallest message gives alpha, and the difference to the largest gives beta.
    """
    num_messages = 2 * (ranks - 1)
    small, large = SIZES[0], SIZES[-1]
    difference = seconds[str(large)] - seconds[str(small)]
    latency = seconds[str(small)] / num_messages
    return latency, num_messages / ranks * (large - small) / difference


if __name__ == "__main__":
    main()
