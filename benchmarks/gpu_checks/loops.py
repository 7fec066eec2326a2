"""One training in bf16 in several loops: `python -m gpu_checks.loops NAME DEVICE`.

All loops take the steps of the recipe `images` with the same model, optimizer, loss and DataLoader
settings, on one device. Each is written as its documentation shows.
"""

from __future__ import annotations

import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from contest import CONTESTANTS
from images import images
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from gpu_checks.here import plan_of, train
from launcher.engine.backends.devices import device_name
from launcher.engine.backends.local import LocalBackend
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.recipe.recipe import Recipe


@dataclass
class Task:
    """What a loop trains, and the clock of its second half."""

    recipe: Recipe
    device: str
    folder: Path
    began: float = 0.0
    ended: float = 0.0
    loader: DataLoader[Any] = field(init=False)
    model: nn.Module = field(init=False)

    def __post_init__(self) -> None:
        self.plan = plan_of(self.recipe)
        self.loader = DataLoader(
            self.recipe.data().train,
            batch_size=self.plan.batch_size,
            shuffle=True,
            num_workers=self.plan.workers_per_rank,
            pin_memory=self.device != "cpu",
            drop_last=True,
        )
        torch.manual_seed(0)
        self.model = self.recipe.model()

    def optimizer(self, model: nn.Module) -> Optimizer:
        """Return the recipe's optimizer."""
        return make_optimizer(self.recipe, model, self.plan.lr)

    def mean_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        """Return the mean loss of a batch, as other loops expect it."""
        total, count = self.recipe.loss(outputs, batch)
        loss: Tensor = total / count
        return loss

    def timed(self, batches: Any) -> Iterator[Any]:
        """Yield batches; the clock runs from the middle to the end."""
        for number, batch in enumerate(batches):
            self.tick(number)
            yield batch
            if number + 1 == len(self.loader):  # before the workers are ended
                self.tick(number + 1)

    def tick(self, number: int) -> None:
        """Take the time after `number` batches, if that is the half of them, or all."""
        if number in (len(self.loader) // 2, len(self.loader)):
            torch.get_device_module(self.device).synchronize()
            self.began, self.ended = self.ended, time.perf_counter()

    def result(self) -> dict[str, Any]:
        """Return the samples per second of the second half."""
        steps = len(self.loader) - len(self.loader) // 2
        seconds = self.ended - self.began
        return {"samples_per_second": steps * self.plan.batch_size / seconds}


def with_launcher(task: Task) -> dict[str, Any]:
    """Train with launcher."""
    recipe = task.recipe
    rows = train(recipe, LocalBackend(recipe, task.plan), task.folder)
    second_half = rows[len(rows) // 2 :]
    seconds = sum(row["step_seconds"] for row in second_half)
    events = map(json.loads, (task.folder / "events.jsonl").read_text().splitlines())
    forward_flops = [e["flops_per_sample"] for e in events if e["event"] == "counted"]
    return {
        "samples_per_second": len(second_half) * task.plan.batch_size / seconds,
        "flops_per_sample": 3 * forward_flops[-1],  # backward takes twice as many
    }


def with_torch(task: Task) -> dict[str, Any]:
    """Train with a plain PyTorch loop."""
    device = torch.device(task.device)
    model = task.model.to(device)
    optimizer = task.optimizer(model)
    for batch in task.timed(task.loader):
        inputs, targets = (tensor.to(device, non_blocking=True) for tensor in batch)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = task.mean_loss(model(inputs), (inputs, targets))
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        optimizer.zero_grad()
    return task.result()


def with_accelerate(task: Task) -> dict[str, Any]:
    """Train with Accelerate."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=task.device == "cpu", mixed_precision="bf16")
    model, optimizer, loader = accelerator.prepare(
        task.model, task.optimizer(task.model), task.loader
    )
    for batch in task.timed(loader):
        loss = task.mean_loss(model(batch[0]), batch)
        accelerator.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
    return task.result()


def with_lightning(task: Task) -> dict[str, Any]:
    """Train with the Trainer of Lightning."""
    import lightning

    class Module(lightning.LightningModule):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Any, number: int) -> Tensor:
            task.tick(number)
            return task.mean_loss(self.model(batch[0]), batch)

        def on_train_batch_end(self, outputs: Any, batch: Any, number: int) -> None:
            del outputs, batch
            if number + 1 == len(task.loader):
                task.tick(number + 1)

        def configure_optimizers(self) -> Optimizer:
            return task.optimizer(self.model)

    trainer = lightning.Trainer(
        accelerator="cpu" if task.device == "cpu" else "gpu",
        devices=1,
        precision="bf16-mixed",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=task.folder,
    )
    trainer.fit(Module(), task.loader)
    return task.result()


LOOPS: dict[str, Callable[[Task], dict[str, Any]]] = {
    "launcher": with_launcher,
    "torch": with_torch,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
}


def main(name: str, device: str, folder: Path) -> dict[str, Any]:
    """Return what was measured in a loop; the reason, if its package is not installed."""
    contestant = CONTESTANTS[name]
    if importlib.util.find_spec(contestant.module) is None:
        remedy = "python -m pip install '.[benchmarks]'"
        return {"not measurable": f"{contestant.package} is not installed: {remedy}"}
    recipe = images(width=256, samples=32768)
    if device == "cpu":
        recipe = images(width=8, samples=256, size=16, batch=16)
        recipe = replace(recipe, device="cpu")
    recipe = replace(recipe, precision="bf16")
    measured = LOOPS[name](Task(recipe, device, folder))
    return measured | {"device_name": device_name(torch.device(device))}


if __name__ == "__main__":
    with TemporaryDirectory() as temporary:
        print(json.dumps(main(sys.argv[1], sys.argv[2], Path(temporary))))
