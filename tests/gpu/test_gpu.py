"""Tests that need a GPU: copies that overlap computation, equal steps, profiles, memory figures."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Literal

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file
from support import ROOT, Commands
from torch import nn
from torch._C._distributed_c10d import HashStore
from torch.utils.data import TensorDataset

from launcher import Data, OptimizerSpec, adamw, four_bits, muon, schedule_free
from launcher.engine.backends.local import LocalBackend
from launcher.engine.backends.placement import Placement
from launcher.engine.data.device_data import DeviceData
from launcher.engine.model.four_bits import unpacked
from launcher.engine.model.fp8 import compute_in_fp8
from launcher.engine.model.sync_batch_norm import synchronize
from launcher.engine.optimizers.taking_steps import take_step
from launcher.engine.state.host_copies import HostCopies, HostMemory
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.environment.machine import read_machine
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve
from launcher.recipes.digits import digits
from launcher.runs.plan_recipe import plan_recipe

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


@contextmanager
def no_waits() -> Iterator[None]:
    """Let torch raise where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@needs_gpu
def test_an_fp16_step_does_not_wait() -> None:
    """Backward, clipping, the loss scale and a skipped step wait for nothing on the GPU."""
    arguments = read_arguments(["precision=fp16", "device=cuda"])
    _, plan = plan_recipe(resolve("digits"), arguments, read_machine(), nproc_per_node=1)
    backend = LocalBackend(digits(), plan)
    model = nn.Linear(4, 2)  # is moved in place
    _, optimizer = backend.prepare(model, [], lambda module: make_optimizer(digits(), module, 0.1))
    x = torch.randn(8, 4, device=backend.device)

    def step(factor: float) -> torch.Tensor:
        with backend.autocast():
            loss = model(x).float().square().sum() * factor
        backend.backward(loss, 1 / 8)
        return backend.apply(optimizer, 1.0)

    step(1.0)  # creates the state of the optimizer
    assert backend.scaler is not None
    scale = float(backend.scaler.scale)
    before = model.weight.detach().clone()
    with no_waits():
        norms = [step(torch.inf)]
    assert torch.equal(model.weight, before)
    assert float(backend.scaler.scale) == scale / 2
    with no_waits():
        norms.append(step(1.0))
    assert [bool(norm.isfinite()) for norm in norms] == [False, True]
    assert not torch.equal(model.weight, before)


OWN = [
    adamw(state_dtype="bf16"),
    adamw(state_dtype="int8"),
    schedule_free(),
    muon(others=adamw(state_dtype="bf16")),
]


@needs_gpu
@pytest.mark.parametrize("named", OWN, ids=str)
@pytest.mark.parametrize("param_dtype", ["fp32", "bf16"])
def test_small_states_do_not_wait(
    named: OptimizerSpec, param_dtype: Literal["fp32", "bf16"]
) -> None:
    """Steps make the host wait for nothing, a skipped one changes nothing, and others go on."""
    device = torch.device("cuda", 0)
    recipe = replace(digits(), optimizer=named, precision="bf16", param_dtype=param_dtype)
    model: nn.Module = nn.Sequential(nn.Linear(96, 96), nn.Linear(96, 96)).to(device)
    if param_dtype == "bf16":
        model = model.bfloat16()
    optimizer = make_optimizer(recipe, model, 0.01)
    true, false = torch.tensor(True, device=device), torch.tensor(False, device=device)

    def step(finite: torch.Tensor) -> list[torch.Tensor]:
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        take_step(optimizer, recipe, finite)
        return [weight.detach().clone() for weight in model.parameters()]

    first = step(true)
    with no_waits():
        skipped = step(false)
        second = step(true)
    for one, other, later in zip(first, skipped, second, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, later)


@needs_gpu
def test_layers_multiply_in_4_and_8_bits() -> None:
    """Outputs of linear layers in 4 bits are those of their weights, and of fp8 within 10 %."""
    device = torch.device("cuda", 0)
    layer = nn.Linear(128, 64).to(device)
    inputs = torch.randn(32, 128, device=device)
    small = four_bits(layer)
    weight = unpacked(small.packed, 128, torch.float32)
    torch.testing.assert_close(small(inputs), nn.functional.linear(inputs, weight, layer.bias))
    pytest.importorskip("torchao")
    if torch.cuda.get_device_capability(device) < (8, 9):
        pytest.skip("needs a GPU that multiplies in fp8")
    model = nn.Sequential(layer, nn.Linear(64, 3).to(device))
    with torch.autocast("cuda", torch.bfloat16):
        expected = model(inputs)
        compute_in_fp8(model)
        outputs = model(inputs)
    assert type(model[0]) is not nn.Linear
    assert type(model[1]) is nn.Linear
    outputs.float().sum().backward()
    assert layer.weight.grad is not None
    assert (outputs - expected).norm() < 0.1 * expected.norm()


@needs_gpu
def test_pinned_copies_use_the_same_memory() -> None:
    """Copies of a checkpoint are pinned, and lie where those of the last checkpoint did."""
    memory = HostMemory(is_pinned=True)
    places = []
    for value in (1.0, 2.0):
        weight = torch.full((1 << 16,), value, device="cuda:0")
        copies = HostCopies([("weight", weight)], 0, 1, memory)
        on_host = copies.tensors["weight"]
        assert isinstance(on_host, torch.Tensor)
        assert on_host.is_pinned()
        assert bool((on_host == value).all())
        places.append(on_host.data_ptr())
        copies.release()
    assert places[0] == places[1]
    memory.free()
    assert memory.num_bytes == 0


@needs_gpu
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_synchronised_batch_norm_is_batch_norm(momentum: float | None, dtype: torch.dtype) -> None:
    """On one rank the layer equals torch's BatchNorm, and its forward and backward do not wait."""
    dist.init_process_group("nccl", store=HashStore(), rank=0, world_size=1)
    try:
        plain = nn.BatchNorm2d(6, momentum=momentum, device="cuda:0")
        synced = synchronize(copy.deepcopy(plain))
        synced(torch.randn(2, 6, 1, 1, device="cuda:0"))  # NCCL starts at its first collective
        synced = synchronize(copy.deepcopy(plain))
        x = torch.randn(5, 6, 4, 4, device="cuda:0", dtype=dtype)
        inputs = [x.clone().requires_grad_() for _ in range(2)]
        expected = plain(inputs[0])
        (expected * x).sum().backward()
        with no_waits():
            out = synced(inputs[1])
            (out * x).sum().backward()
        torch.testing.assert_close(out, expected)
        torch.testing.assert_close(inputs[1].grad, inputs[0].grad)
        for name, buffer in plain.named_buffers():
            torch.testing.assert_close(synced.get_buffer(name), buffer)
        for name, parameter in plain.named_parameters():
            torch.testing.assert_close(synced.get_parameter(name).grad, parameter.grad)
    finally:
        dist.destroy_process_group()


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


@needs_gpu
def test_data_on_a_gpu_gives_the_same_steps(run: Commands) -> None:
    """Batches that are made on the GPU give the weights of copied ones to the bit."""
    for place in ("true", "false"):
        done = run(
            *("launcher", "run", "digits", "-n", "1", "epochs=2", "deterministic=true"),
            *(f"data_on_device={place}", "--out", place),
        )
        assert done.exit_code == 0, done.stderr
    here, there = (load_file(run.folder / p / "model.safetensors") for p in ("true", "false"))
    assert all(torch.equal(here[name], weight) for name, weight in there.items())


@needs_gpu
def test_batches_are_made_on_a_gpu_without_a_wait() -> None:
    """The host waits for nothing between the request of a batch and the batch on the GPU."""
    device = torch.device("cuda", 0)
    data = Data(train=TensorDataset(torch.arange(100.0), torch.arange(100)))
    on_device = DeviceData(data, device)
    indices = torch.tensor([7, 3, 99])
    on_device.batch("train", indices)
    with no_waits():
        batch = on_device.batch("train", indices)
    assert batch is not None
    assert [tensor.tolist() for tensor in batch] == [[7.0, 3.0, 99.0], [7, 3, 99]]
    assert {tensor.device for tensor in batch} == {device}


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
@pytest.mark.parametrize("settings", [(), ("precision=bf16",), ("optimizer=adamw", "lr=0.003")])
def test_the_bits_do_not_depend_on_the_gpus(run: Commands, settings: tuple[str, ...]) -> None:
    """Exact sums over NCCL have the bits of one GPU; on one GPU, those of a second run."""
    worlds = [1, *(ranks for ranks in (2, 3, 4, 8) if ranks <= GPUS)]
    digests = []
    for folder, ranks in enumerate(worlds if len(worlds) > 1 else [1, 1]):
        done = run(
            *("launcher", "prove", f"{ROOT / 'benchmarks/parts.py'}:norms", "--json"),
            *("--worlds", str(ranks), "--strategies", "ddp", "--steps", "30"),
            *("--out", str(folder), *settings),
        )
        assert done.exit_code == 0, done.stderr
        digests += [row["weights_sha256"] for row in json.loads(done.stdout)["rows"]]
    assert len(set(digests)) == 1


@needs_gpus
def test_sharded_bits_do_not_depend_on_the_gpus(run: Commands) -> None:
    """Exact sums under FSDP over NCCL have the bits of one GPU."""
    worlds = ",".join(str(ranks) for ranks in (1, 2, 3, 4, 8) if ranks <= GPUS)
    for recipe in ("norms", "text"):
        done = run(
            *("launcher", "prove", f"{ROOT / 'benchmarks/parts.py'}:{recipe}"),
            *("--worlds", worlds, "--strategies", "ddp,fsdp", "--steps", "30"),
        )
        assert done.exit_code == 0, done.stdout + done.stderr


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


@needs_gpu
def test_the_health_of_gpus_is_examined(run: Commands) -> None:
    """The management library of this machine answers, and every check has a finding."""
    done = run("launcher", "doctor", "-n", "1", "--json")
    findings = json.loads(done.stdout)["findings"]
    checks = {finding["check"] for finding in findings}
    assert checks >= {"ECC memory", "Xid errors", "clocks", "PCIe", "GPU users"}
    assert not [finding for finding in findings if finding["check"] == "GPU health"]


@needs_gpu
def test_a_rank_says_which_cpus_it_keeps_to(run: Commands) -> None:
    """The log of a rank has its NUMA node or why it is not bound; with numa=off it has neither."""
    for name, words in (("auto", ()), ("off", ("numa=off",))):
        done = run("launcher", "run", "digits", "-n", "1", "steps=5", *words, "--out", name)
        assert done.exit_code == 0, done.stderr
    logs = {name: (run.folder / name / "logs/rank0.log").read_text() for name in ("auto", "off")}
    assert "NUMA node" in logs["auto"]
    assert "NUMA node" not in logs["off"]


@needs_gpu
def test_passes_are_timed_on_each_gpu(run: Commands) -> None:
    """On one rank and, where there are GPUs, on several, passes take a part of each step."""
    for ranks in range(1, min(GPUS, 2) + 1):
        done = run("launcher", "run", "digits", "-n", f"{ranks}", "steps=50", "--out", f"{ranks}")
        assert done.exit_code == 0, done.stderr
        lines = (run.folder / f"{ranks}/metrics.jsonl").read_text().splitlines()
        rows = [row for row in map(json.loads, lines) if "ranks" in row or "grad_norm" in row]
        devices = [row["ranks"]["device_seconds"] for row in rows if "ranks" in row][-1]
        steps = [row["step_seconds"] for row in rows if "grad_norm" in row][-10:]
        assert len(devices) == ranks
        assert all(0 < seconds < 1.2 * max(steps) for seconds in devices)


SAVES_ON_CPU = """
import torch
from pathlib import Path
from launcher.engine.saving.checkpoint_tensors import write_shard
write_shard(Path("."), 0, {"model/weight": torch.ones(3)})
print(torch.cuda.is_available(), torch.cuda.is_initialized())
"""


@needs_gpu
def test_writing_tensors_of_the_host_opens_no_gpu(run: Commands) -> None:
    """A checkpoint is written without CUDA being initialised, as where a run trains on the CPU."""
    done = run("python", "-c", SAVES_ON_CPU)
    assert done.exit_code == 0, done.stderr
    assert done.stdout.split() == ["True", "False"]
