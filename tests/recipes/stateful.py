"""Models and optimizers with state beyond weights and buffers of a fixed shape."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from launcher import Data, Recipe, constant, sgd

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def stateful(*, optimizer: str = "history", model: str = "all") -> Recipe:
    """A model and an optimizer with every kind of state, all of which affects later steps."""
    return Recipe(
        name="stateful",
        model=MODELS[model],
        data=build_data,
        loss=loss,
        optimizer=OPTIMIZERS[optimizer],
        batch_size=16,
        lr=0.1,
        lr_batch_size=16,
        steps=4,
        schedule=constant(),
        in_memory=True,
        train_samples=64,
    )


def build_everything() -> nn.Module:
    """Return a model with extra state and buffers that grow, appear, share memory and overlap."""
    import torch
    from torch import nn

    class Model(nn.Module):
        scale: Tensor
        seen: Tensor | None
        near: Tensor
        far: Tensor
        wide: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.out, self.calls, self.sums = nn.Linear(8, 3), 0, torch.zeros(2)
            self.register_buffer("scale", torch.empty(0))
            self.register_buffer("seen", None)
            places = torch.arange(16.0)
            self.register_buffer("near", places[:8])
            self.register_buffer("far", places[4:])
            self.register_buffer("wide", torch.ones(1).expand(8))
            self.register_buffer("weight", self.out.weight.data)

        def get_extra_state(self) -> dict[str, Any]:
            return {"calls": self.calls, "sums": [self.sums], "label": "é"}

        def set_extra_state(self, state: dict[str, Any]) -> None:
            self.calls, (self.sums,) = state["calls"], state["sums"]

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                if not self.scale.numel():
                    self.scale = torch.full((x.shape[1],), 0.5)
                self.seen = torch.ones(1) if self.seen is None else self.seen * 0.9
                self.calls += 1
                self.sums = self.sums + 0.01
            strength = 1 + 0.1 * self.calls + self.sums.sum()
            if self.seen is not None:
                strength = strength + self.seen
            scale = self.scale if self.scale.numel() else 1.0
            outputs: Tensor = self.out(x * scale * self.wide * strength + 0.01 * self.near)
            return outputs

    return Model()


def build_sparse() -> nn.Module:
    """Return a model with a buffer that safetensors cannot hold."""
    import torch
    from torch import nn

    model = nn.Linear(8, 3)
    model.register_buffer("mask", torch.eye(3).to_sparse())
    return model


def build_unwritable() -> nn.Module:
    """Return a model whose extra state is an object."""
    from torch import nn

    class Model(nn.Linear):
        def get_extra_state(self) -> object:
            return object()

        def set_extra_state(self, state: object) -> None:
            """Ignore the state."""

    return Model(8, 3)


def keep_history(model: nn.Module, lr: float) -> Optimizer:
    """Return SGD whose step sizes depend on a dict in its state and a number in its groups."""
    import torch

    class History(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for group in self.param_groups:
                group["taken"] = group.get("taken", 0) + 1
                for parameter in group["params"]:
                    history = self.state[parameter].setdefault("history", {"norms": []})
                    history["norms"].append(group["taken"])
                    parameter.grad.mul_(1 / len(history["norms"]))
            return super().step(closure)

    return History(model.parameters(), lr=lr, momentum=0.9)


def keep_by_text(model: nn.Module, lr: float) -> Optimizer:
    """Return SGD that keeps state under a string instead of a parameter."""
    import torch

    class ByText(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state["ema"] = {"mean": torch.zeros(3)}  # type: ignore[index]
            return super().step(closure)

    return ByText(model.parameters(), lr=lr)


def build_data() -> Data:
    """Return 64 samples of 8 numbers in 3 classes."""
    import torch
    from torch.utils.data import TensorDataset

    samples = TensorDataset(torch.randn(64, 8), torch.randint(3, (64,)))
    return Data(train=samples, evaluation=samples)


def loss(outputs: Tensor, batch: list[Tensor]) -> tuple[Tensor, int]:
    """Return the summed cross-entropy and the number of samples."""
    from torch.nn.functional import cross_entropy

    return cross_entropy(outputs, batch[1], reduction="sum"), len(batch[1])


MODELS = {"all": build_everything, "sparse": build_sparse, "unwritable": build_unwritable}
OPTIMIZERS: dict[str, Any] = {"sgd": sgd(), "history": keep_history, "text": keep_by_text}
