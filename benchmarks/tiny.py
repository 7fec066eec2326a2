"""Recipe with a net so small that the loop dominates a step, and with a clock in the net."""

from __future__ import annotations

import itertools
from pathlib import Path
from time import perf_counter, thread_time
from typing import TYPE_CHECKING

from launcher import Data, Recipe, log, one_cycle, sgd
from launcher.recipes.digits import read_digits

if TYPE_CHECKING:
    from torch import Tensor, nn

TRAIN_SAMPLES = 1408
BATCH_SIZE = 32
WARM_UP = 400


def tiny(
    *,
    seconds: str,
    epochs: int = 60,
    batch: int = BATCH_SIZE,
    width: int = 32,
    hidden_layers: int = 1,
    warm_up: int = WARM_UP,
    logs: bool = False,
) -> Recipe:
    """Digits as vectors, and a small net that writes the time of a step to the file `seconds`.

    If `logs` is set, the loss logs a number in each step.
    """
    num_calls = epochs * TRAIN_SAMPLES // batch
    return Recipe(
        name="tiny",
        model=lambda: build_model(Path(seconds), warm_up, num_calls, width, hidden_layers),
        data=build_data,
        loss=logged_cross_entropy if logs else cross_entropy,
        optimizer=sgd(momentum=0.9),
        schedule=one_cycle(),
        batch_size=batch,
        lr=0.05,
        lr_batch_size=batch,
        epochs=epochs,
        train_samples=TRAIN_SAMPLES,
        in_memory=True,
    )


def build_model(
    seconds: Path, warm_up: int, last: int, width: int, hidden_layers: int
) -> nn.Module:
    """Return a net that maps vectors (N, 64) to logits (N, 10) and measures the time between calls.

    Args:
        seconds: File that every rank writes in call `last`: the mean wall time from call to call
            since call `warm_up`, and the mean CPU time of the calling thread, both in seconds.
        warm_up: Number of the call at which the clock starts.
        last: Number of the call at which the clock stops.
        width: Neurons in each hidden layer.
        hidden_layers: Number of hidden layers.
    """
    from torch import nn

    class Timed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = [64, *[width] * hidden_layers]
            hidden = [
                layer
                for inputs, outputs in itertools.pairwise(sizes)
                for layer in (nn.Linear(inputs, outputs), nn.Tanh())
            ]
            self.layers = nn.Sequential(*hidden, nn.Linear(width, 10))
            self.calls = 0
            self.started = 0.0, 0.0

        def forward(self, vectors: Tensor) -> Tensor:
            self.calls += 1
            if self.calls in (warm_up, last):
                now = perf_counter(), thread_time()
                seconds_per_call = [
                    (end - start) / (last - warm_up)
                    for end, start in zip(now, self.started, strict=True)
                ]
                self.started = now
                if self.calls == last:
                    seconds.write_text(" ".join(map(str, seconds_per_call)))
            logits: Tensor = self.layers(vectors)
            return logits

    return Timed()


def build_data() -> Data:
    """Return TRAIN_SAMPLES digits as (vector, label), a number that fills every batch."""
    from torch.utils.data import TensorDataset

    images, labels = read_digits()
    vectors = images[:TRAIN_SAMPLES].flatten(1)
    return Data(train=TensorDataset(vectors, labels[:TRAIN_SAMPLES]))


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the sum of the cross-entropies and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def logged_cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Log the mean cross-entropy, and return the sum and the number of samples."""
    total, count = cross_entropy(logits, batch)
    log("cross_entropy", total, count)
    return total, count
