"""Tests that need a GPU: copies that overlap computation, equal steps, profiles, memory figures."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from support import ROOT, Commands

from launcher.engine.backends.placement import Placement

GPUS = torch.cuda.device_count() if torch.cuda.is_available() else 0
needs_gpu = pytest.mark.skipif(GPUS < 1, reason="`make test-gpu` needs a GPU")
needs_gpus = pytest.mark.skipif(GPUS < 2, reason="`make test-gpu` needs two GPUs for it")

pytestmark = pytest.mark.gpu


@needs_gpu
def test_copies_run_on_a_stream_of_their_own() -> None:
    """Nested batches arrive complete even if their memory is reused while copies are in flight."""
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
    """One GPU, with pinned memory and workers, reaches the weights of a CPU within 0.1 percent."""
    recipe = ROOT / "tests/recipes/worlds.py"
    for name, device in (("gpu", "cuda"), ("cpu", "cpu")):
        done = run("launcher", "run", recipe, "-n", "1", f"device={device}", "--out", name)
        assert done.exit_code == 0, done.stderr
    gpu, cpu = (load_file(run.folder / name / "model.safetensors") for name in ("gpu", "cpu"))
    for name, weight in cpu.items():
        assert (gpu[name] - weight).norm() <= 1e-3 * weight.norm()


@needs_gpus
def test_two_gpus_train_as_one_does(run: Commands) -> None:
    """Two ranks over NCCL reach the weights of one rank within 0.01 percent."""
    recipe = ROOT / "tests/recipes/worlds.py"
    for ranks in ("1", "2"):
        done = run("launcher", "run", recipe, "-n", ranks, "num_workers=2", "--out", ranks)
        assert done.exit_code == 0, done.stderr
        result = json.loads((run.folder / ranks / "result.json").read_text())
        assert result["samples"] == 750
    one, two = (load_file(run.folder / ranks / "model.safetensors") for ranks in ("1", "2"))
    for name, weight in one.items():
        assert (two[name] - weight).norm() <= 1e-4 * weight.norm()


@needs_gpu
def test_a_gpu_is_profiled(run: Commands) -> None:
    """A profile assigns kernels to the part of the step that launched them, and loses no time."""
    done = run("launcher", "profile", "digits", "-n", "1", "--steps", "5", "--json")
    assert done.exit_code == 0, done.stderr
    [profile] = json.loads(done.stdout)
    parts = profile["parts"]
    assert parts["forward"] > 0
    assert parts["backward"] > 0
    assert sum(parts.values()) == pytest.approx(profile["step_seconds"])
    assert profile["operations"]


@needs_gpu
def test_gpu_memory_is_recorded(run: Commands) -> None:
    """The heartbeat has the memory of the GPU, and the first event its name."""
    done = run("launcher", "run", "digits", "-n", "1", "--out", "out")
    assert done.exit_code == 0, done.stderr
    heartbeat = json.loads((run.folder / "out/health/rank0.json").read_text())
    assert 0 < heartbeat["memory_bytes"] <= heartbeat["memory_total_bytes"]
    first_event = json.loads((run.folder / "out/events.jsonl").read_text().splitlines()[0])
    assert first_event["device_name"] == torch.cuda.get_device_name(0)
    assert run("launcher", "report", "out").exit_code == 0


@needs_gpus
def test_communication_time_is_measured(run: Commands) -> None:
    """Every step records the communication time of DDP, and the last one's is positive."""
    done = run("launcher", "run", "digits", "-n", "2", "--out", "out")
    assert done.exit_code == 0, done.stderr
    lines = (run.folder / "out/metrics.jsonl").read_text().splitlines()
    waits = [row["communication_seconds"] for row in map(json.loads, lines) if "grad_norm" in row]
    assert all(wait is not None and wait >= 0 for wait in waits)
    assert waits[-1] > 0
