"""Objectives that share an encoder, with optimizers, schedules and intervals of their own."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Objective, Recipe, adamw, constant, main, one_cycle, sgd
from launcher.recipes.digits import read_digits

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

    Batch = tuple[Tensor, Tensor]

SAMPLES, HELD_OUT = 178, 70


def turns(*, shares: bool = True) -> Recipe:
    """Digits by three objectives; an epoch has 2 batches of 62 and one of 54.

    Args:
        shares: Whether the second objective says that it trains what the first one trains.
    """
    return Recipe(
        name="turns",
        model=build_model,
        data=build_data,
        forward=classify,
        objectives=(
            Objective(
                name="classes",
                parameters=("encoder.*", "classes.*"),
                loss=cross_entropy,
                max_grad_norm=0.5,
            ),
            Objective(
                name="brightness",
                parameters=("encoder.*", "brightness.*"),
                forward=guess_brightness,
                loss=squared_error,
                optimizer=adamw(weight_decay=0.1),
                schedule=constant(),
                lr=0.0002,
                every=2,
                shares=shares,
            ),
            Objective(
                name="imitation",
                parameters="student.*",
                forward=ask_both,
                loss=distance,
                optimizer=make_adam,
                lr=0.003,
            ),
        ),
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, weight_decay=1e-4, decay_1d=False),
        schedule=one_cycle(),
        batch_size=62,
        lr=0.05,
        lr_batch_size=62,
        lr_rule="sqrt",
        epochs=3,
        train_samples=SAMPLES,
        virtual_ranks=6,
        in_memory=True,
        record_samples=True,
    )


def make_adam(model: nn.Module, lr: float) -> Optimizer:
    """Return torch's Adam over the parameters that require a gradient."""
    from torch.optim import Adam

    return Adam([p for p in model.parameters() if p.requires_grad], lr=lr, foreach=True)


def build_model() -> nn.Module:
    """Return a model with an encoder of blocks with BatchNorm and dropout, heads and a teacher."""
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear, self.norm, self.dropout = (
                nn.Linear(64, 64, bias=False),
                nn.BatchNorm1d(64),
                nn.Dropout(0.2),
            )

        def forward(self, x: Tensor) -> Tensor:
            hidden: Tensor = self.dropout(self.norm(self.linear(x)).relu())
            return x + hidden

    teacher = nn.Sequential(nn.Flatten(), nn.Dropout(0.5), nn.Linear(64, 10))
    return nn.ModuleDict(
        {
            "encoder": nn.Sequential(nn.Flatten(), Block(), Block()),
            "classes": nn.Linear(64, 10),
            "brightness": nn.Linear(64, 1),
            "student": nn.Sequential(nn.Flatten(), nn.Linear(64, 10)),
            "teacher": teacher.requires_grad_(False),
        }
    )


def build_data() -> Data:
    """Return 178 training and 70 evaluation digits."""
    from torch.utils.data import TensorDataset

    images, labels = read_digits()
    end = SAMPLES + HELD_OUT
    return Data(
        train=TensorDataset(images[:SAMPLES], labels[:SAMPLES]),
        evaluation=TensorDataset(images[SAMPLES:end], labels[SAMPLES:end]),
    )


def classify(model: nn.ModuleDict, batch: Batch) -> Tensor:
    """Return logits (N, 10)."""
    logits: Tensor = model["classes"](model["encoder"](batch[0]))
    return logits


def guess_brightness(model: nn.ModuleDict, batch: Batch) -> Tensor:
    """Return a guess (N, 1) of the mean of each image."""
    guess: Tensor = model["brightness"](model["encoder"](batch[0]))
    return guess


def ask_both(model: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the student and of the teacher, which never drops anything."""
    teacher = model["teacher"].eval()
    return model["student"](batch[0]), teacher(batch[0])


def cross_entropy(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed cross-entropy and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def squared_error(guess: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the summed squared errors and the number of samples."""
    return (guess.float().squeeze(1) - batch[0].mean((1, 2, 3))).square().sum(), len(batch[1])


def distance(outputs: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, int]:
    """Return the summed squared distance of student and teacher, and the number of samples."""
    student, teacher = (logits.float() for logits in outputs)
    return (student - teacher).square().sum(), len(batch[1])


def accuracy(logits: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the number of correct predictions and the number of samples."""
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


if __name__ == "__main__":
    main(turns)
