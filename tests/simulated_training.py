"""Train a network with launcher's loop on a simulated device and on the CPU, and compare.

    python tests/simulated_training.py FOLDER

A program for test_simulated_device.py. It writes what it has measured to FOLDER/measured.json.
"""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import simulated_device
import torch
from safetensors.torch import load_file
from simulated_device import LOG
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, adamw, make_plan, read_machine, sgd
from launcher.engine.backends.base import Backend
from launcher.engine.backends.local import LocalBackend
from launcher.engine.data.device_data import DeviceData
from launcher.engine.ranks.output import Output
from launcher.engine.ranks.processes import peak_bytes
from launcher.engine.ranks.usage import usage_of
from launcher.engine.run import train_rank
from launcher.planning.plan import Plan
from launcher.runs.job import ResumeFrom
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

SAMPLES = 70
STOP_AFTER = 7
"""Steps after which a run is interrupted; the epoch has five."""


class SimulatedBackend(LocalBackend):
    """The backend of one process, on the simulated device."""

    def __init__(self, recipe: Recipe, plan: Plan) -> None:
        Backend.__init__(self, recipe, plan, simulated_device.DEVICE)
        self.reads = 0
        self.waits: list[str] = []
        """The waits for the device between two reads, in training."""

    def read(self, values: Tensor) -> Any:
        """Read values; what waited since the last read is kept."""
        self.waits += LOG.waits
        numbers = super().read(values)
        LOG.waits.clear()
        self.reads += 1
        return numbers


@dataclass(frozen=True)
class Pair:
    """A batch whose class launcher does not know, with a method to move it."""

    inputs: Tensor
    targets: Tensor

    def to(self, device: torch.device, *, non_blocking: bool = False) -> Pair:
        """Return the pair on a device."""
        return Pair(
            self.inputs.to(device, non_blocking=non_blocking),
            self.targets.to(device, non_blocking=non_blocking),
        )


def make_data() -> Data:
    """Return samples of a linear function with noise."""
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(SAMPLES + 20, 6, generator=generator)
    targets = inputs @ torch.randn(6, 1, generator=generator) + 0.3
    return Data(
        train=TensorDataset(inputs[:SAMPLES], targets[:SAMPLES]),
        evaluation=TensorDataset(inputs[SAMPLES:], targets[SAMPLES:]),
    )


def make_model(norm: Callable[[int], nn.Module] = nn.BatchNorm1d) -> nn.Module:
    """Return a network with random masks and, by default, statistics of batches."""
    return nn.Sequential(nn.Linear(6, 16), norm(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 1))


def squared_error(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the sum of squared errors, and the number of samples."""
    return functional.mse_loss(outputs, batch[1], reduction="sum"), len(batch[1])


def make_recipe(**changes: Any) -> Recipe:
    """Return a small regression recipe with some fields changed."""
    fields: dict[str, Any] = {
        "name": "line",
        "model": make_model,
        "data": make_data,
        "loss": squared_error,
        "count": lambda batch: len(batch[1]),
        "batch_size": 14,
        "micro_batch_size": 7,
        "lr": 0.01,
        "lr_batch_size": 14,
        "epochs": 3,
        "train_samples": SAMPLES,
        "optimizer": adamw(),
        "max_grad_norm": 0.5,
        "checkpoint_every": 2,
        "num_workers": 0,
    }
    return Recipe(**fields | changes)


def train(
    recipe: Recipe, folder: Path, device: str, *, last_step: int | None = None, resume: bool = False
) -> Backend:
    """Train on a device, or resume the training of a folder; return the backend."""
    folder.mkdir(exist_ok=True)
    machine = replace(read_machine(), num_gpus=int(device != "cpu"))
    recipe = replace(recipe, device="cpu" if device == "cpu" else "cuda")
    plan = make_plan(recipe, machine, nproc_per_node=1)
    kind = LocalBackend if device == "cpu" else SimulatedBackend
    backend = kind(recipe, plan)
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    train_rank(
        recipe,
        plan,
        backend,
        RunDir(folder),
        output,
        stop=StopRequest(),
        start=ResumeFrom() if resume else None,
        last_step=last_step,
    )
    backend.close()
    return backend


def summary(folder: Path) -> dict[str, Any]:
    """Return the losses, the gradient norms, the evaluations and the weights of a run."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return {
        "losses": [row["loss"] for row in rows if "loss" in row],
        "norms": [row["grad_norm"] for row in rows if "loss" in row],
        "evaluations": [row["evaluation"]["loss"] for row in rows if "evaluation" in row],
        "weights": {
            name: tensor.flatten().tolist()
            for name, tensor in load_file(folder / "model.safetensors").items()
        },
        "peak_bytes": [row["peak_bytes"] for row in rows if "peak_bytes" in row],
    }


def compare(name: str, folder: Path, recipe: Recipe) -> dict[str, Any]:
    """Train a recipe on both, and on the device with an interruption."""
    train(recipe, folder / f"{name}-cpu", "cpu")
    LOG.clear()
    backend = train(recipe, folder / f"{name}-device", "device")
    assert isinstance(backend, SimulatedBackend)
    log = asdict(LOG) | {"reads": backend.reads, "waits": backend.waits}
    train(recipe, folder / f"{name}-resumed", "device", last_step=STOP_AFTER)
    train(recipe, folder / f"{name}-resumed", "device", resume=True)
    train(recipe, folder / f"{name}-moved", "device", last_step=STOP_AFTER)
    train(recipe, folder / f"{name}-moved", "cpu", resume=True)
    places = ("cpu", "device", "resumed", "moved")
    return {place: summary(folder / f"{name}-{place}") for place in places} | {"log": log}


def collate_pair(samples: list[Any]) -> Pair:
    """Return samples as an object of a class of this file."""
    inputs, targets = zip(*samples, strict=True)
    return Pair(torch.stack(inputs), torch.stack(targets))


def make_pairs() -> Recipe:
    """Return the recipe with batches of a class that launcher does not know."""
    base = make_data()
    return make_recipe(
        data=lambda: replace(base, collate=collate_pair),
        forward=lambda model, batch: model(batch.inputs),
        loss=lambda outputs, batch: (
            functional.mse_loss(outputs, batch.targets, reduction="sum"),
            len(batch.targets),
        ),
        count=None,
    )


VARIANTS: dict[str, Callable[[], Recipe]] = {
    "adamw": make_recipe,
    "sgd": lambda: make_recipe(
        # Without buffers, whose copies wait, nothing but the end of a save waits for its copies.
        model=lambda: make_model(nn.Identity),
        optimizer=sgd(momentum=0.9),
        max_grad_norm=None,
    ),
    "fp64": lambda: make_recipe(precision="fp64"),
    "objects": make_pairs,
    "workers": lambda: make_recipe(num_workers=1),
    "on_device": lambda: make_recipe(data_on_device=True),
}


def late_copies(device: torch.device) -> dict[str, bool]:
    """Return what tensors hold before and after somebody waits for a copy, and what is refused."""
    module = simulated_device.MODULE
    numbers = torch.arange(3.0)
    stream = simulated_device.Stream()
    with module.stream(stream):
        on_device = numbers.pin_memory().to(device, non_blocking=True)
    early = simulated_device.host_memory(on_device).isnan().all()
    module.current_stream().wait_stream(stream)
    arrived = torch.equal(on_device.cpu(), numbers)
    host = torch.empty(3, pin_memory=True).copy_(on_device, non_blocking=True)
    early_on_host = host.isnan().all()
    module.synchronize()
    try:
        is_refused = not isinstance(on_device + numbers, Tensor)
    except RuntimeError:
        is_refused = True
    return {
        "late on the device": bool(early),
        "arrives on the device": arrived,
        "late on the host": bool(early_on_host),
        "arrives on the host": torch.equal(host, numbers),
        "mixed devices are refused": is_refused,
    }


def refusal(device: torch.device) -> list[str]:
    """Return the class and the text of what refuses 4 GiB of samples, of which 3 GiB are free."""
    samples = torch.zeros(1).expand(1 << 30)  # takes no memory before it is copied
    try:
        DeviceData(Data(train=TensorDataset(samples)), device)
    except Exception as error:  # noqa: BLE001  # its class is what is tested
        return [type(error).__name__, str(error)]
    return []


def main() -> None:
    """Train every variant, and write what was measured."""
    folder = Path(sys.argv[1])
    device = simulated_device.install()
    measured: dict[str, Any] = {"device": late_copies(device)}
    measured |= {name: compare(name, folder, make()) for name, make in VARIANTS.items()}
    measured["refusal"] = refusal(device)
    measured["peak_bytes"] = peak_bytes(device)
    usage = usage_of(device)
    while not (values := usage()):
        pass
    measured["usage"] = values
    (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
