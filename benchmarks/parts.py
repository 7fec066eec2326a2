"""Recipes whose steps depend on every split of a batch, unless they have virtual ranks.

same_bits.py and tests/integration/test_same_bits.py train them.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from launcher import Data, Recipe, adamw, main, one_cycle, sgd
from launcher.recipes.digits import read_digits

if TYPE_CHECKING:
    from torch import Tensor, nn

VIRTUAL_RANKS = 8
PADDING = 0


def norms() -> Recipe:
    """Digits with BatchNorm and dropout; an epoch has 4 batches of 62 and one of 2."""
    return Recipe(
        name="norms",
        model=build_norms,
        data=read_data,
        loss=cross_entropy,
        metrics={"accuracy": accuracy},
        optimizer=sgd(momentum=0.9, weight_decay=1e-4),
        schedule=one_cycle(),
        batch_size=62,
        lr=0.1,
        lr_batch_size=62,
        epochs=6,
        train_samples=250,
        in_memory=True,
        record_samples=True,
        virtual_ranks=VIRTUAL_RANKS,
        exact=True,
    )


def text() -> Recipe:
    """Sentences of different lengths, padded, with a loss over their words; 5 batches of 50."""
    return replace(
        norms(),
        name="text",
        model=build_text,
        data=lambda: Data(train=Sentences(250), evaluation=Sentences(70), collate=pad),
        loss=word_loss,
        metrics={},
        count=lambda batch: int((batch[1] != PADDING).sum()),
        optimizer=adamw(weight_decay=0.1),
        lr=0.003,
        batch_size=50,
        lr_batch_size=50,
        max_grad_norm=0.5,
    )


def build_norms() -> nn.Module:
    """Return a model from images (N, 1, 8, 8) to logits (N, 10), with BatchNorm and dropout."""
    from torch import nn

    return nn.Sequential(
        nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Flatten(), nn.Dropout(0.3), nn.Linear(8 * 64, 10),
    )  # fmt: skip


def read_data() -> Data:
    """Return 250 training and 70 evaluation digits."""
    from torch.utils.data import TensorDataset

    images, labels = read_digits()
    return Data(
        train=TensorDataset(images[:250], labels[:250]),
        evaluation=TensorDataset(images[250:320], labels[250:320]),
    )


def cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


def accuracy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    """Return the number of correct predictions and the number of samples."""
    return (logits.argmax(1) == batch[1]).sum(), len(batch[1])


def build_text() -> nn.Module:
    """Return a model from words (N, T) to logits (N, T, 50), with attention and dropout."""
    from torch import nn

    layer = nn.TransformerEncoderLayer(24, 2, 48, dropout=0.2, batch_first=True)
    return nn.Sequential(
        nn.Embedding(50, 24), nn.TransformerEncoder(layer, 2, enable_nested_tensor=False),
        nn.Linear(24, 50),
    )  # fmt: skip


class Sentences:
    """Random sentences of 3 to 11 words."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __len__(self) -> int:
        return self.number

    def __getitem__(self, index: int) -> Tensor:
        import torch

        generator = torch.Generator().manual_seed(index)
        length = int(torch.randint(3, 12, (), generator=generator))
        return torch.randint(1, 50, (length,), generator=generator)


def pad(sentences: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Return words and next words, both of shape (N, T), padded to the longest sentence."""
    from torch.nn.utils.rnn import pad_sequence

    words = pad_sequence(sentences, batch_first=True, padding_value=PADDING)
    return words[:, :-1], words[:, 1:]


def word_loss(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of the next words, and their number."""
    from torch.nn.functional import cross_entropy

    total = cross_entropy(
        logits.flatten(0, 1), batch[1].flatten(), ignore_index=PADDING, reduction="sum"
    )
    return total, (batch[1] != PADDING).sum()


if __name__ == "__main__":
    main(norms)
