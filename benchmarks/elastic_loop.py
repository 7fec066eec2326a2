"""The recipe of recovery.py as a plain PyTorch loop with checkpoints, for torchrun's restarts.

    torchrun --nnodes 1:2 --max-restarts 3 benchmarks/elastic_loop.py OUT SECONDS_PER_STEP

It is what the documentation of torchrun asks of a script: it loads the newest checkpoint when it
starts. Each rank writes its process id, and rank 0 the time of each step, for recovery.py.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from steady import Noisy, build_model
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

BATCH, STEPS_PER_CHECKPOINT = 50, 4


def main(out: Path, seconds_per_step: float) -> None:
    """Train until the process is killed."""
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    out.mkdir(parents=True, exist_ok=True)
    (out / f"pid{rank}").write_text(str(os.getpid()))
    torch.manual_seed(0)
    model = DistributedDataParallel(build_model())
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.003)
    checkpoint, data, step = out / "checkpoint.pt", Noisy(), 0
    if checkpoint.exists():
        state = torch.load(checkpoint)
        step = state["step"]
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
    if rank == 0:
        write(out / "events.jsonl", event="began", step=step)
    while True:
        time.sleep(seconds_per_step)
        rows = [data[(step * BATCH + row) % len(data)] for row in range(rank, BATCH, world)]
        images = torch.stack([image for image, _ in rows])
        loss = cross_entropy(model(images), torch.tensor([label for _, label in rows]))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        step += 1
        if rank > 0:
            continue
        write(out / "metrics.jsonl", step=step, loss=loss.item())
        if step % STEPS_PER_CHECKPOINT == 0:
            state = {"step": step, "model": model.state_dict(), "optimizer": optimizer.state_dict()}
            torch.save(state, out / "new.pt")
            (out / "new.pt").rename(checkpoint)


def write(file: Path, **values: object) -> None:
    """Append a line with the present time."""
    with file.open("a") as lines:
        lines.write(json.dumps({"time": time.time(), **values}) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]))
