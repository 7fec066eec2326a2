"""What needs a GPU: copies beside computation, and equal steps under NCCL."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, Commands

from launcher.engine.placement import Placement

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="no GPU that torch can use")
needs_gpus = pytest.mark.skipif(GPUS < 2, reason="fewer than two GPUs that torch can use")

pytestmark = pytest.mark.gpu


@needs_gpu
def test_copies_run_on_a_stream_of_their_own() -> None:
    """Nested batches arrive whole, also when their memory is reused while copies are under way."""
    device = torch.device("cuda", 0)
    placement = Placement(device)
    busy = torch.randn(4096, 4096, device=device)
    sums = []
    for number in range(50):
        pinned = torch.full((1 << 20,), float(number)).pin_memory()
        batch = placement.copy({"inputs": [pinned], "name": "as it is"})
        assert batch["name"] == "as it is"
        busy = busy @ busy / 4096
        sums.append(batch["inputs"][0].mean())
        del batch
    assert torch.stack(sums).tolist() == [float(number) for number in range(50)]


@needs_gpu
def test_a_gpu_trains_as_a_cpu_does(run: Commands) -> None:
    """One GPU, with pinned memory and workers, ends near the weights of a CPU."""
    recipe = ROOT / "tests/recipes/worlds.py"
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        done = run("launcher", "run", recipe, "-n", "1", f"device={device}", "--out", name)
        assert done.exit_code == 0, done.stderr
    gpu, cpu = (load_file(run.folder / name / "model.safetensors") for name in ("gpu", "cpu"))
    for name, weight in cpu.items():
        assert (gpu[name] - weight).norm() <= 1e-3 * weight.norm()


@needs_gpus
def test_two_gpus_train_as_one_does(run: Commands) -> None:
    """Two ranks over NCCL end with the weights of one."""
    recipe = ROOT / "tests/recipes/worlds.py"
    for ranks in ("1", "2"):
        done = run("launcher", "run", recipe, "-n", ranks, "num_workers=2", "--out", ranks)
        assert done.exit_code == 0, done.stderr
        result = json.loads((run.folder / ranks / "result.json").read_text())
        assert result["samples"] == 750
    one, two = (load_file(run.folder / ranks / "model.safetensors") for ranks in ("1", "2"))
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-4 * weight.norm()
