"""Distillation: a small net learns from what a larger one says of handwritten digits.

The student learns the teacher's softened probabilities beside the labels (arXiv:1503.02531). By
default the teacher learns along with it, as an objective of its own with its own optimizer. With
`teacher=FILE` it is frozen, with the weights of a run of the recipe `digits`:

    launcher run digits --out runs/teacher
    launcher run distill teacher=runs/teacher/model.safetensors
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from launcher import Data, Objective, Recipe, main, one_cycle, sgd
from launcher.recipes import digits

if TYPE_CHECKING:
    from torch import Tensor, nn

    Batch = tuple[Tensor, Tensor]

TEMPERATURE, SHARE = 3.0, 0.7
"""By what logits are divided before they are compared, and the weight of what the teacher says."""


def distill(*, teacher: Path | None = None) -> Recipe:
    """Distillation on digits of 8 x 8 pixels: a net of 1,210 weights learns from a larger one.

    Args:
        teacher: Weights of a finished teacher; none trains it along with the student.
    """
    student = Objective(name="student", parameters="student.*", loss=imitate)
    return Recipe(
        name="distill",
        model=lambda: build_model(teacher),
        data=build_data,
        forward=answer_both,
        loss=imitate,
        objectives=(student,)
        if teacher
        else (
            Objective(
                name="teacher",
                parameters="teacher.*",
                forward=answer_as_teacher,
                loss=digits.cross_entropy,
                max_grad_norm=1.0,
            ),
            student,
        ),
        metrics={"accuracy": accuracy, "teacher_accuracy": teacher_accuracy},
        optimizer=sgd(momentum=0.9, nesterov=True, weight_decay=5e-4),
        schedule=one_cycle(),
        batch_size=128,
        lr=0.1,
        lr_batch_size=128,
        epochs=20,
        train_samples=1437,
        in_memory=True,
    )


def build_model(teacher: Path | None) -> nn.ModuleDict:
    """Return the net of the recipe `digits` as the teacher, and a smaller student.

    Args:
        teacher: Weights of the teacher, which is then frozen.
    """
    from torch import nn

    model = nn.ModuleDict(
        {
            "teacher": digits.build_model(),
            "student": nn.Sequential(nn.Flatten(), nn.Linear(64, 16), nn.ReLU(), nn.Linear(16, 10)),
        }
    )
    if teacher is not None:
        from safetensors.torch import load_file

        model["teacher"].load_state_dict(load_file(teacher))
        model["teacher"].requires_grad_(False)
    return model


def build_data() -> Data:
    """Return the digits as (image, label), every fifth held out."""
    return digits.build_data()


def answer_both(model: nn.ModuleDict, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the logits of the student and those of the teacher, which learns nothing from this."""
    import torch

    teacher = model["teacher"].eval()  # its answers have no dropout, whatever the mode of the model
    with torch.no_grad():
        answers = teacher(batch[0])
    return model["student"](batch[0]), answers


def answer_as_teacher(model: nn.ModuleDict, batch: Batch) -> Tensor:
    """Return the logits of the teacher, which learns from the labels."""
    logits: Tensor = model["teacher"].train(model.training)(batch[0])
    return logits


def imitate(outputs: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, int]:
    """Return the student's loss: its distance from the teacher, and the cross-entropy."""
    from torch.nn.functional import cross_entropy, kl_div, log_softmax

    student, teacher = (logits.float() for logits in outputs)
    distance = kl_div(
        log_softmax(student / TEMPERATURE, dim=1),
        log_softmax(teacher / TEMPERATURE, dim=1),
        reduction="sum",
        log_target=True,
    )
    error = cross_entropy(student, batch[1], reduction="sum")
    return SHARE * TEMPERATURE**2 * distance + (1 - SHARE) * error, len(batch[1])


def accuracy(outputs: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, int]:
    """Return the number of digits that the student classifies correctly, and that of digits."""
    return digits.accuracy(outputs[0], batch)


def teacher_accuracy(outputs: tuple[Tensor, Tensor], batch: Batch) -> tuple[Tensor, int]:
    """Return the number of digits that the teacher classifies correctly, and that of digits."""
    return digits.accuracy(outputs[1], batch)


if __name__ == "__main__":
    main(distill)
