"""Train a recipe with another framework, in the loop that its documentation shows.

The benchmarks start it, one process per rank:

    torchrun --nproc-per-node 2 benchmarks/frameworks.py accelerate digits --out FOLDER

Like `launcher run`, it writes metrics.jsonl, samples/ and model.safetensors.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import click
import numpy as np
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import clip_grad_norm_
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.utils.data import DataLoader, Dataset, DistributedSampler, SequentialSampler

from launcher import Recipe
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.randomness import seed_all
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.recipe.overrides import build, read_arguments
from launcher.recipe.resolve import resolve

RANK = int(os.environ.get("RANK", "0"))
RANKS = int(os.environ.get("WORLD_SIZE", "1"))

Batch = list[Tensor]
"""Inputs, targets and sample ids of a batch."""


class Numbered(Dataset[tuple[Tensor, ...]]):
    """Dataset that adds to each sample its id."""

    def __init__(self, tensors: tuple[Tensor, ...]) -> None:
        self.tensors = (*tensors, torch.arange(len(tensors[0])))

    def __len__(self) -> int:
        return len(self.tensors[0])

    def __getitem__(self, index: int) -> tuple[Tensor, ...]:
        return tuple(tensor[index] for tensor in self.tensors)


class InOrder(Numbered):
    """Dataset of all epochs of a recipe, in the recipe's order, that reads a batch in one call."""

    def __init__(self, tensors: tuple[Tensor, ...], recipe: Recipe) -> None:
        super().__init__(tensors)
        samples = len(tensors[0])
        order = [
            Permutation(samples, recipe.seed, epoch)(np.arange(samples))
            for epoch in range(recipe.epochs or 0)
        ]
        self.tensors = tuple(tensor[np.concatenate(order)] for tensor in self.tensors)

    def __getitems__(self, indices: list[int]) -> Batch:
        rows = torch.tensor(indices)
        return [tensor[rows] for tensor in self.tensors]


@dataclass
class Task:
    """Parts of a recipe in the form that the frameworks take: model, loader, optimizer, loss."""

    recipe: Recipe
    """Recipe to train."""

    batch_size: int
    """Samples per step on one rank."""

    same_order: bool
    """Whether the samples come in the recipe's order instead of the framework's shuffled order."""

    folder: Path
    """Folder for the results."""

    steps: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    """Sample ids and mean loss of each step on this rank."""

    rates: list[float] = field(default_factory=list)
    """Learning rate of each step; empty if `same_order`."""

    def __post_init__(self) -> None:
        tensors = self.recipe.data().train.tensors
        self.samples = InOrder(tensors, self.recipe) if self.same_order else Numbered(tensors)
        self.epochs = 1 if self.same_order else self.recipe.epochs or 1
        seed_all(self.recipe.seed)
        self.model: nn.Module = self.recipe.model()

    def loader(self, sampler: Any = None) -> DataLoader[Any]:
        return DataLoader(
            self.samples,
            batch_size=self.batch_size,
            shuffle=not self.same_order and sampler is None,
            sampler=sampler,
            collate_fn=_identity if self.same_order else None,
        )

    def shared_loader(self) -> DataLoader[Any]:
        """Return a loader of this rank's shard, for frameworks that leave sharding to the user."""
        if RANKS == 1:
            return self.loader()
        return self.loader(
            DistributedSampler(self.samples, RANKS, RANK, shuffle=not self.same_order)
        )

    def optimizer(self, model: nn.Module) -> Optimizer:
        return make_optimizer(self.recipe, model, self.recipe.lr)

    def schedule(self, optimizer: Optimizer, steps: int) -> LRScheduler:
        """Return torch's equivalent of the recipe's one_cycle()."""
        return OneCycleLR(
            optimizer,
            self.recipe.lr,
            total_steps=steps,
            pct_start=0.45,
            div_factor=10,
            final_div_factor=1000,
            three_phase=True,
            anneal_strategy="linear",
        )

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Return the mean loss of the batch, as these frameworks expect it, and record it."""
        total, count = self.recipe.loss(outputs, batch)
        loss: Tensor = total / count
        self.steps.append((batch[2], loss.detach()))
        return loss

    def finish(self) -> None:
        """Gather the steps of all ranks; write the results on rank 0."""
        steps = [(ids.tolist(), loss.item()) for ids, loss in self.steps]
        steps_by_rank: list[Any] = [steps]
        if RANKS > 1:
            if not dist.is_initialized():
                dist.init_process_group("gloo")
            steps_by_rank = [None] * RANKS
            dist.all_gather_object(steps_by_rank, steps)
        if RANK:
            return
        (self.folder / "samples").mkdir(parents=True)
        with (
            (self.folder / "metrics.jsonl").open("w") as metrics,
            (self.folder / "samples/rank0.jsonl").open("w") as samples,
        ):
            rates = self.rates or [0.0] * len(steps)
            all_shares = zip(*steps_by_rank, strict=False)
            for step, (shares, lr) in enumerate(zip(all_shares, rates, strict=False), start=1):
                ids = [ids for ids, _ in shares]
                items = sum(map(len, ids))
                loss = sum(loss * len(ids) for ids, loss in shares) / items
                row = {"step": step, "loss": loss, "lr": lr, "items": items, "grad_norm": 0.0}
                metrics.write(json.dumps(row) + "\n")
                samples.write(json.dumps({"step": step, "micro_batches": ids}) + "\n")
        weights = {name: tensor.contiguous() for name, tensor in self.model.state_dict().items()}
        safetensors.torch.save_file(weights, self.folder / "model.safetensors")


def with_torch(task: Task) -> None:
    """Train with a plain PyTorch loop, under DDP on several ranks."""
    model = task.model
    if RANKS > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    loader = task.shared_loader()
    optimizer = task.optimizer(model)
    scheduler = task.schedule(optimizer, task.epochs * len(loader))
    for epoch in range(task.epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss = task.loss(model(batch[0]), batch)
            loss.backward()
            if task.recipe.max_grad_norm is not None:
                clip_grad_norm_(model.parameters(), task.recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()


def with_ignite(task: Task) -> None:
    """Train with an ignite Engine that shows its progress bar."""
    from ignite.engine import Engine, Events
    from ignite.handlers import ProgressBar
    from ignite.metrics import RunningAverage

    model = task.model
    if RANKS > 1:
        dist.init_process_group("gloo")
        model = DistributedDataParallel(model)
    loader = task.shared_loader()
    optimizer = task.optimizer(model)
    scheduler = task.schedule(optimizer, task.epochs * len(loader))

    def update(_: Any, batch: Batch) -> float:
        model.train()
        optimizer.zero_grad()
        loss = task.loss(model(batch[0]), batch)
        loss.backward()
        if task.recipe.max_grad_norm is not None:
            clip_grad_norm_(model.parameters(), task.recipe.max_grad_norm)
        optimizer.step()
        return loss.item()

    def advance() -> None:
        scheduler.step()

    def reshuffle() -> None:
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(trainer.state.epoch - 1)

    trainer = Engine(update)
    RunningAverage(output_transform=float).attach(trainer, "loss")
    trainer.add_event_handler(Events.ITERATION_COMPLETED, advance)
    trainer.add_event_handler(Events.EPOCH_STARTED, reshuffle)
    if RANK == 0:
        ProgressBar().attach(trainer, ["loss"])
    trainer.run(loader, max_epochs=task.epochs)


def with_fabric(task: Task) -> None:
    """Train with Lightning Fabric."""
    from lightning.fabric import Fabric

    fabric = Fabric(accelerator="cpu", devices=RANKS, strategy="ddp" if RANKS > 1 else "auto")
    fabric.launch()
    model, optimizer = fabric.setup(task.model, task.optimizer(task.model))
    loader = fabric.setup_dataloaders(task.loader())
    scheduler = task.schedule(optimizer, task.epochs * len(loader))
    for epoch in range(task.epochs):
        if isinstance(loader.sampler, DistributedSampler):
            loader.sampler.set_epoch(epoch)
        for batch in loader:
            optimizer.zero_grad()
            loss = task.loss(model(batch[0]), batch)
            fabric.backward(loss)
            if task.recipe.max_grad_norm is not None:
                fabric.clip_gradients(model, optimizer, max_norm=task.recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()


def with_accelerate(task: Task) -> None:
    """Train with Accelerate, with a schedule of the length of the loader before `prepare`."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    plain_optimizer, plain_loader = task.optimizer(task.model), task.loader()
    plain_scheduler = task.schedule(plain_optimizer, task.epochs * len(plain_loader))
    model, optimizer, loader, scheduler = accelerator.prepare(
        task.model, plain_optimizer, plain_loader, plain_scheduler
    )
    for _ in range(task.epochs):
        for batch in loader:
            optimizer.zero_grad()
            loss = task.loss(model(batch[0]), batch)
            accelerator.backward(loss)
            if task.recipe.max_grad_norm is not None:
                accelerator.clip_grad_norm_(model.parameters(), task.recipe.max_grad_norm)
            optimizer.step()
            scheduler.step()


def with_lightning(task: Task) -> None:
    """Train with the Trainer of Lightning."""
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = task.model

        def training_step(self, batch: Batch, _: int) -> Tensor:
            loss = task.loss(self.model(batch[0]), batch)
            self.log("loss", loss, prog_bar=True)
            return loss

        def configure_optimizers(self) -> Any:
            optimizer = task.optimizer(self.model)
            scheduler = task.schedule(optimizer, int(self.trainer.estimated_stepping_batches))
            return [optimizer], [{"scheduler": scheduler, "interval": "step"}]

    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=RANKS,
        strategy="ddp" if RANKS > 1 else "auto",
        max_epochs=task.epochs,
        gradient_clip_val=task.recipe.max_grad_norm,
        use_distributed_sampler=not task.same_order,  # Lightning's sampler would shuffle
        default_root_dir=task.folder.parent / f"{task.folder.name}.lightning",
    )
    trainer.fit(Module(), task.shared_loader() if task.same_order else task.loader())


def with_hf(task: Task) -> None:
    """Train with the Trainer of Hugging Face Transformers."""
    import transformers

    class Trainer(transformers.Trainer):
        def compute_loss(self, model: nn.Module, inputs: Batch, *_: Any, **__: Any) -> Tensor:
            return task.loss(model(inputs[0]), inputs)

        def create_scheduler(
            self, num_training_steps: int, optimizer: Optimizer | None = None
        ) -> LRScheduler:
            self.lr_scheduler = task.schedule(optimizer or self.optimizer, num_training_steps)
            return self.lr_scheduler

        def _get_train_sampler(self, *arguments: Any) -> Any:
            if task.same_order:
                return SequentialSampler(task.samples)
            return super()._get_train_sampler(*arguments)

    clip = task.recipe.max_grad_norm
    trainer = Trainer(
        model=task.model,
        args=transformers.TrainingArguments(
            output_dir=str(task.folder.parent / f"{task.folder.name}.hf"),
            per_device_train_batch_size=task.batch_size,
            num_train_epochs=task.epochs,
            max_grad_norm=0.0 if clip is None else clip,
            use_cpu=True,
            remove_unused_columns=False,
            save_strategy="no",
            report_to="none",
        ),
        train_dataset=task.samples,
        data_collator=_identity if task.same_order else torch.utils.data.default_collate,
        optimizers=(task.optimizer(task.model), None),
    )
    trainer.train()


FRAMEWORKS: dict[str, Callable[[Task], None]] = {
    "torch": with_torch,
    "ignite": with_ignite,
    "fabric": with_fabric,
    "accelerate": with_accelerate,
    "lightning": with_lightning,
    "hf": with_hf,
}


def _identity(batch: Batch) -> Batch:
    return batch


@click.command()
@click.argument("framework", type=click.Choice(list(FRAMEWORKS)))
@click.argument("recipe")
@click.argument("overrides", nargs=-1)
@click.option("--batch-size", type=int, help="Samples per rank; default: the recipe's batch size.")
@click.option("--same-order", is_flag=True, help="Take the samples in the recipe's order.")
@click.option("--out", type=click.Path(path_type=Path), required=True)
def main(
    framework: str,
    recipe: str,
    overrides: tuple[str, ...],
    batch_size: int | None,
    same_order: bool,
    out: Path,
) -> None:
    """Train RECIPE with FRAMEWORK."""
    built = build(resolve(recipe), read_arguments(overrides)).recipe
    task = Task(built, batch_size or built.batch_size or 1, same_order, out)
    if not same_order:

        def record_rate(optimizer: Optimizer, *_: Any) -> None:
            task.rates.append(optimizer.param_groups[0]["lr"])

        register_optimizer_step_pre_hook(record_rate)
    FRAMEWORKS[framework](task)
    task.finish()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads may abort a process that exits while they still run


if __name__ == "__main__":
    main()
