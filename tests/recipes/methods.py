"""A recipe whose forward uses attributes, methods, submodules and weights of the model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from launcher import Data, Recipe


@dataclass(frozen=True)
class Outputs:
    """Outputs in a container that torch's own tree functions do not look into."""

    scores: Any


def methods() -> Recipe:
    """Never call the model as a whole."""
    return Recipe(
        name="methods",
        model=build_model,
        data=build_data,
        loss=loss,
        forward=forward,
        batch_size=16,
        lr=0.01,
        lr_batch_size=16,
        epochs=2,
        train_samples=80,
        in_memory=True,
        record_samples=True,
    )


def build_model() -> Any:
    """Return a model with blocks, and with a weight that ZeRO-3 shards."""
    import torch
    from torch import Tensor, nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.layer = nn.LayerNorm(400), nn.Linear(400, 400)

        def forward(self, x: Tensor) -> Any:
            return x + self.layer(self.norm(x)).tanh()

    class Net(nn.Module):
        num_classes = 3

        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(8, 400, 64) / 8)
            self.blocks = nn.ModuleList([Block(), Block()])
            self.norm, self.head = nn.LayerNorm(400), nn.Linear(400, 5)

        def encode(self, x: Tensor) -> Any:
            x = x @ self.table.sum(2)
            for block in self.blocks:
                x = block(x)
            return self.norm(x)

    return Net()


def forward(model: Any, batch: Any) -> Outputs:
    """Return the scores of the model's classes."""
    return Outputs(scores=model.head(model.encode(batch[0]))[:, : model.num_classes])


def build_data() -> Data:
    """Return samples of three classes."""
    import torch
    from torch.utils.data import TensorDataset

    x = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    y = x[:, :3].argmax(1)
    return Data(train=TensorDataset(x[:80], y[:80]), evaluation=TensorDataset(x[80:], y[80:]))


def loss(outputs: Outputs, batch: Any) -> tuple[Any, int]:
    """Return the sum of cross-entropies."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs.scores, batch[1], reduction="sum"), len(batch[1])
