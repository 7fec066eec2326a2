"""How often the ranks of a node start `nvidia-smi`, counted by a program of that name."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from support import Commands

_COUNTING = """#!/bin/sh
echo "$@" >>{calls}
printf 'NVIDIA GeForce RTX 4090, NVIDIA GeForce RTX 4090\\n'
"""

# The device is the only pretence: a rank with a GPU takes another way through Accelerate.
_RANKS = """
import os
import sys
from pathlib import Path
from unittest import mock

import torch
import torch.multiprocessing
from examples import NODE, recipe

from launcher import make_plan
from launcher.engine.backends import accelerate, base, open_backend
from launcher.environment.world import World

def rank(index, strategy, store):
    training = recipe(strategy=strategy, precision="fp32", device="cuda")
    plan = make_plan(training, NODE, nproc_per_node=2)
    world = World(
        rank=index, world_size=2, local_rank=index, local_world_size=2, store=Path(store)
    )
    join = accelerate.join_process_group
    with (
        mock.patch.object(torch.cuda, "is_available", lambda: True),
        mock.patch.object(torch.cuda, "device_count", lambda: 2),
        mock.patch.object(torch.cuda, "set_device", lambda _: None),
        mock.patch.object(torch.cuda, "Stream", lambda _: None),
        mock.patch.object(accelerate, "planned_device", lambda *_: torch.device("cuda", index)),
        mock.patch.object(accelerate, "device_identity", str),
        mock.patch.object(base, "pci_address_of", lambda _: "0000:01:00.0"),
        mock.patch.object(
            accelerate, "join_process_group", lambda world, _, timeout: join(world, "gloo", timeout)
        ),
    ):
        backend = open_backend(training, plan, world)
        assert (backend.rank, backend.world_size) == (index, 2)
        assert backend._accelerator.device.type == "cuda"
    sys.stdout.flush()
    os._exit(0)

if __name__ == "__main__":
    torch.multiprocessing.spawn(rank, (sys.argv[1], sys.argv[2]), nprocs=2)
"""


@pytest.mark.parametrize("strategy", ["ddp", "zero1"])
def test_no_rank_starts_nvidia_smi(run: Commands, tmp_path: Path, strategy: str) -> None:
    """Two ranks that take the way of GPUs through Accelerate and DeepSpeed start none."""
    calls = tmp_path / "calls"
    calls.touch()
    program = tmp_path / "bin/nvidia-smi"
    program.parent.mkdir()
    program.write_text(_COUNTING.format(calls=calls))
    program.chmod(0o755)
    (run.folder / "ranks.py").write_text(_RANKS)
    tests = Path(__file__).parents[1]
    env = {"PATH": f"{program.parent}:{os.environ['PATH']}", "PYTHONPATH": str(tests)}
    done = run("python", "ranks.py", strategy, tmp_path / "store", env=env)
    assert done.exit_code == 0, done.stderr
    assert calls.read_text() == ""
