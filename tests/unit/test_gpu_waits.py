"""The host does not wait for a GPU between two reads of the meter."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from gpu_waits import GPU, recorded_waits
from measured_steps import measured_step
from torch import Tensor, nn
from torch.optim import Optimizer

from launcher import adamw, log, schedule_free, sgd
from launcher.engine.backends.base import poison_nonfinite
from launcher.engine.backends.local import LocalBackend
from launcher.engine.backends.transfers import upload, upload_scalar, upload_tensor
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.prefetching import pinned
from launcher.engine.metrics.meter import Meter, RankFlags
from launcher.engine.metrics.noise_meter import LocalNoiseMeter, ReducedNoiseMeter
from launcher.engine.metrics.step_measurements import MicroBatchLoss, StepMeasurements
from launcher.engine.model.sync_batch_norm import SyncBatchNorm, _NormaliseOverRanks
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.state.loss_scaler import LossScaler
from launcher.engine.training.loop import _count_items
from launcher.engine.training.loss_calls import sum_and_count
from launcher.environment.machine import read_machine
from launcher.recipe.overrides import read_arguments
from launcher.recipe.resolve import resolve
from launcher.recipes import digits, fashion_mnist, finetune, gpt, resnet, rough_intervals, tabular
from launcher.runs.plan_recipe import plan_recipe

WAITS: dict[str, Callable[[Tensor], object]] = {
    "item": lambda tensor: tensor.sum().item(),
    "tolist": lambda tensor: tensor.tolist(),
    "bool": lambda tensor: bool(tensor.sum()),
    "nonzero": torch.ops.aten.nonzero,
    "a number": lambda tensor: torch.tensor(1.0, device=tensor.device),
    "a copy to the GPU": lambda tensor: torch.zeros(3).to(tensor.device),
    "a copy to the host": lambda tensor: tensor.to("cpu"),
}


@pytest.mark.parametrize("wait", WAITS.values(), ids=WAITS)
def test_the_recorder_sees_waits(wait: Callable[[Tensor], object]) -> None:
    """Each way to wait for a GPU is recorded with the line that waits."""
    with recorded_waits() as waits:
        tensor = torch.zeros(3, device=GPU)
        with contextlib.suppress(RuntimeError):  # fake tensors cannot go on without values
            wait(tensor)
    assert waits
    assert all("test_gpu_waits.py" in place for place in waits)


def test_numbers_are_uploaded_without_a_wait() -> None:
    """Numbers, mixed with scalar tensors or not, reach the GPU without a wait."""
    with recorded_waits() as waits:
        loss = torch.zeros((), device=GPU)
        tensors = [
            upload([1, 2.5, 3], GPU),
            upload([loss, 2], GPU),
            upload_scalar(7, GPU),
            upload_scalar(loss, GPU),
            upload_tensor(torch.arange(3), GPU),
        ]
    assert waits == []
    assert all(tensor.device == GPU for tensor in tensors)
    assert [tensor.shape for tensor in tensors[:3]] == [(3,), (2,), ()]


CLASSES = (
    lambda: torch.zeros(5, 10),
    lambda: (torch.zeros(5, 1), torch.zeros(5, dtype=torch.long)),
)
TOKENS = (
    lambda: torch.zeros(5, 8, 256),
    lambda: (torch.zeros(5, 8, dtype=torch.long), torch.zeros(5, 8, dtype=torch.long)),
)


def _on_gpu(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros(value.shape, dtype=value.dtype, device=GPU)
    return tuple(map(_on_gpu, value))


FLIGHTS = (
    lambda: torch.zeros(5),
    lambda: (torch.zeros(5, 3, dtype=torch.long), torch.zeros(5, 4), torch.zeros(5)),
)
INTERVALS = (lambda: torch.zeros(5, 2), lambda: (torch.zeros(5, 7, 2), torch.zeros(5, 2)))

FUNCTIONS: dict[str, tuple[Callable[[Any, Any], Any], Any]] = {
    "digits loss": (digits.cross_entropy, CLASSES),
    "digits accuracy": (digits.accuracy, CLASSES),
    "fashion_mnist loss": (lambda o, b: fashion_mnist.cross_entropy(o, b, 0.1), CLASSES),
    "fashion_mnist accuracy": (fashion_mnist.accuracy, CLASSES),
    "resnet loss": (resnet.cross_entropy, CLASSES),
    "resnet accuracy": (resnet.accuracy, CLASSES),
    "gpt loss": (gpt.cross_entropy, TOKENS),
    "gpt bits": (gpt.bits_per_byte, TOKENS),
    "finetune loss": (finetune.token_cross_entropy, TOKENS),
    "tabular loss": (tabular.squared_error, FLIGHTS),
    "tabular error": (tabular.error, FLIGHTS),
    "rough_intervals loss": (rough_intervals.squared_error, INTERVALS),
    "rough_intervals error": (rough_intervals.error, INTERVALS),
    "rough_intervals coverage": (rough_intervals.coverage, INTERVALS),
}
"""Losses and metrics of the shipped recipes, with the shapes of their outputs and batches."""


@pytest.mark.parametrize("name", FUNCTIONS)
def test_shipped_losses_and_metrics_do_not_wait(name: str) -> None:
    """Losses and metrics of shipped recipes, and their totals in an evaluation, do not wait."""
    function, (make_outputs, make_batch) = FUNCTIONS[name]
    with recorded_waits() as waits:
        outputs, batch = _on_gpu(make_outputs()), _on_gpu(make_batch())
        upload(sum_and_count(function, outputs, batch, name=name), GPU)
    assert waits == []


class FakeGPU(LocalBackend):
    """A backend whose tensors are fake ones on a GPU; its reads are counted, not recorded."""

    def __init__(self, precision: str = "fp32", optimizer: Any = None) -> None:
        overrides = read_arguments([f"precision={precision}"])
        _, plan = plan_recipe(resolve("digits"), overrides, read_machine(), nproc_per_node=1)
        recipe = digits.digits()
        super().__init__(
            recipe if optimizer is None else replace(recipe, optimizer=optimizer), plan
        )
        self.device = GPU
        self.scaler = LossScaler(1, GPU) if precision == "fp16" else None
        self.num_reads = 0

    def read(self, values: Tensor) -> Any:
        self.num_reads += 1
        zeros: Any = np.ones(values.shape).tolist()
        return zeros


def measurements(step: int, num_items: int | Tensor) -> StepMeasurements:
    """Return what the loop measures in a step of two micro-batches on the GPU."""
    loss = torch.zeros((), device=GPU)
    count = torch.ones((), dtype=torch.long, device=GPU)
    losses = [MicroBatchLoss(loss, 3, None), MicroBatchLoss(loss, count, None)]
    return measured_step(step, samples=5, items=num_items, losses=losses)


def test_counting_and_measuring_a_step_do_not_wait() -> None:
    """A step that counts tokens, logs and measures its noise waits in the meter's reads alone."""
    backend = FakeGPU()
    context = SimpleNamespace(recipe=replace(digits.digits(), count=len), backend=backend)
    request = SimpleNamespace(count=5, has_weight=True)
    with recorded_waits() as waits:
        micro_batches = [MicroBatch(batch=None, items=5, request=request)]  # type: ignore[arg-type]
        num_items = _count_items(context, 5, micro_batches)  # type: ignore[arg-type]
        assert isinstance(num_items, Tensor)
        meter = Meter(backend)
        loss = torch.zeros((), device=GPU)
        for step in range(3):
            for _ in range(2):
                with meter.logged.of(micro_batches[0].request):
                    log("tensors", loss, torch.ones((), dtype=torch.long, device=GPU))
                    log("both", 2.0, loss)
            meter.add(measurements(step, num_items)._replace(logged=meter.logged.take()))
        noise_meter = LocalNoiseMeter(backend, nn.Linear(2, 2), stride=1)
        noise_meter.begin(0)
        noise_meter._add_gradient(torch.zeros(2, 2, device=GPU))
        noise_meter.add_micro_batch(1 / num_items, 5)
        noise_meter.end(0, num_items, loss)
        assert waits == []
        assert backend.num_reads == 0
        meter.read(RankFlags(), is_last=True)
        noise_meter.read()
    assert waits == []
    assert backend.num_reads >= 2


def gpu_parameter() -> nn.Parameter:
    """Return a parameter on the GPU."""
    return nn.Parameter(torch.zeros(3, 2, device=GPU))


def own_fused_adam(model: nn.Module, lr: float) -> Optimizer:
    """Return torch's fused Adam, as a recipe's own function makes it."""
    return torch.optim.Adam(model.parameters(), lr, fused=True)


def own_adam(model: nn.Module, lr: float) -> Optimizer:
    """Return an Adam that cannot skip a step on the device."""
    return torch.optim.Adam(model.parameters(), lr, foreach=True)


STEPS: dict[str, tuple[Any, int]] = {
    "sgd": (sgd(), 0),
    "sgd without momentum": (sgd(momentum=0.0), 0),
    "adamw": (adamw(), 0),
    "small states": (adamw(state_dtype="bf16"), 0),
    "schedule-free": (schedule_free(), 0),
    "a recipe's fused optimizer": (own_fused_adam, 0),
    "a recipe's other optimizer": (own_adam, 1),
}
"""Optimizers, and how often the host waits in a step that does not create their state."""


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_skipped_on_the_device(name: str, precision: str) -> None:
    """Clipping, the loss scale and skipped steps make the host wait in no step but the first."""
    make, num_waits = STEPS[name]
    with recorded_waits() as waits:
        backend = FakeGPU(precision, make)
        model = nn.Module()
        model.weight = gpu_parameter()
        optimizer = make_optimizer(backend.recipe, model, 0.1)
        if name in ("sgd", "sgd without momentum", "adamw"):  # fake weights are of another class
            optimizer.param_groups[0]["fused"] = True
        loss = torch.zeros((), device=GPU)
        num_items = upload_scalar(5, GPU)

        def step() -> None:
            weight = poison_nonfinite(loss, backend.scaled(1 / num_items))
            assert weight.device == GPU
            model.weight.grad = torch.zeros(3, 2, device=GPU)
            assert backend.apply(optimizer, max_grad_norm=1.0).device == GPU

        step()
        if name == "sgd":  # the kernel that fake tensors cannot follow creates no state
            buffer = torch.zeros_like(model.weight)
            optimizer.state[model.weight] = {"momentum_buffer": buffer}
        waits.clear()
        step()
        step()
        assert len(waits) == 2 * num_waits
        assert backend.num_reads == 0


def test_the_loss_scale_is_read_with_the_metrics() -> None:
    """The host reads the loss scale where the meter reads the steps, once for all of them."""
    num_reads = []
    for precision in ("fp32", "fp16"):
        with recorded_waits() as waits:
            backend = FakeGPU(precision)
            meter = Meter(backend)
            for step in range(3):
                meter.add(measurements(step, 5))
            meter.read(RankFlags(), is_last=True)
        assert waits == []
        num_reads.append(backend.num_reads)
    assert num_reads[1] == num_reads[0] + 1


def test_the_noise_of_offloaded_gradients_is_measured() -> None:
    """Norms of gradients that are on the CPU are summed with the counts on the GPU."""
    backend = FakeGPU()
    with recorded_waits():
        model = nn.Linear(2, 2)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        noise_meter = ReducedNoiseMeter(backend, model, stride=1)
        noise_meter.begin(0)
        for _ in range(2):
            noise_meter.add_micro_batch(0.1, 5)
        noise_meter.end(0, 10, torch.ones(()))
        noise_meter.read()
    assert backend.num_reads >= 1


def test_batches_are_pinned_except_what_is_on_a_gpu() -> None:
    """A data set may have some of its tensors on the GPU; the others reach it without a wait."""
    with recorded_waits() as waits:
        on_cpu, on_gpu = torch.zeros(3), torch.zeros(3, device=GPU)
        request: Any = SimpleNamespace(has_weight=True)
        unpinned = MicroBatch(batch={"a": [on_cpu], "b": on_gpu}, items=3, request=request)
        batch = pinned(unpinned).batch
        assert batch["b"] is on_gpu
        assert waits == []
        assert batch["a"][0].to(GPU, non_blocking=True).device == GPU
        assert waits == []
        on_cpu.to(GPU, non_blocking=True)
    assert len(waits) == 1


def no_collectives(monkeypatch: pytest.MonkeyPatch, world_size: int) -> None:
    """Let collectives on the GPU do nothing, as if there were other ranks."""
    for name in ("all_reduce", "all_gather_into_tensor"):
        monkeypatch.setattr(dist, name, lambda *_, **__: None)
    monkeypatch.setattr(dist, "get_world_size", lambda: world_size)


@pytest.mark.parametrize("ranks_with_weight", [None, 2])
@pytest.mark.parametrize("has_weight", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
def test_synchronised_batch_norm_does_not_wait(
    monkeypatch: pytest.MonkeyPatch,
    ranks_with_weight: int | None,
    momentum: float | None,
    *,
    has_weight: bool,
) -> None:
    """Forward and backward of a layer do not wait, whichever ranks have samples."""
    no_collectives(monkeypatch, 3)
    with recorded_waits() as waits:
        layer = SyncBatchNorm(4, momentum=momentum, device=GPU)
        layer.ranks_with_weight = ranks_with_weight
        waits.clear()
        x = torch.zeros(5 if has_weight else 0, 4, 3, device=GPU)
        assert layer._normalise_on_gpus(x, layer._averaging_factor()).shape == x.shape
        for num in (5, 0):
            gradient, mean = torch.zeros(num, 4, 3, device=GPU), torch.zeros(4, device=GPU)
            saved = (gradient, layer.weight, mean, mean, mean.int())
            context = SimpleNamespace(saved_tensors=saved, needs_input_grad=(True,) * 8)
            gradients = _NormaliseOverRanks.backward(context, gradient)
            assert (gradients[0] is not None) is (num > 0)
    assert waits == []


def test_torchs_batch_norm_waits_for_a_cumulative_average() -> None:
    """A BatchNorm with momentum=None, of a recipe, reads the number of batches in each pass."""
    with recorded_waits() as waits:
        layer = nn.BatchNorm1d(4, momentum=None, device=GPU)
        with contextlib.suppress(Exception):
            layer(torch.zeros(5, 4, device=GPU))
    assert len(waits) == 1
