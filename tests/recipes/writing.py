"""Models whose forward pass writes to buffers and weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from launcher import Data, Recipe, constant

if TYPE_CHECKING:
    from torch import Tensor, nn


def writing(*, model: str = "mean") -> Recipe:
    """A classifier of 8 numbers whose forward pass writes to buffers or weights."""
    return Recipe(
        name="writing",
        model=MODELS[model],
        data=build_data,
        loss=loss,
        batch_size=16,
        lr=0.1,
        lr_batch_size=16,
        steps=5,
        schedule=constant(),
        in_memory=True,
        train_samples=64,
    )


def build_mean() -> nn.Module:
    """Return a model with a running mean of its inputs that does not affect its outputs."""
    import torch
    from torch import nn

    class Model(nn.Linear):
        mean: Tensor

        def __init__(self) -> None:
            super().__init__(8, 3)
            self.register_buffer("mean", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    self.mean.lerp_(x.mean(0), 0.5)
            return super().forward(x)

    return Model()


def build_codebook() -> nn.Module:
    """Return a model that writes to the data of a buffer, which no version counter shows."""
    import torch
    from torch import nn

    class Model(nn.Linear):
        codes: Tensor

        def __init__(self) -> None:
            super().__init__(8, 3)
            self.register_buffer("codes", torch.zeros(8))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.codes.data.mul_(0.9).add_(x.detach().mean(0))
            return super().forward(x)

    return Model()


def build_clamped() -> nn.Module:
    """Return a model that writes to the data of its weights."""
    from torch import nn

    class Model(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            self.weight.data.clamp_(-0.1, 0.1)
            return super().forward(x)

    return nn.Sequential(Model(8, 8), Model(8, 3))


def build_minima() -> nn.Module:
    """Return a model with running minima that start at infinity, and a large integer."""
    import torch
    from torch import nn

    class Model(nn.Linear):
        least: Tensor
        largest: Tensor

        def __init__(self) -> None:
            super().__init__(8, 3)
            self.register_buffer("least", torch.full((9,), torch.inf))
            self.register_buffer("largest", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.least[:8] = torch.minimum(self.least[:8], x.detach().amin(0))
                self.largest += (x.detach().amax() * 2**60).long()
            return super().forward(x)

    return Model()


def build_queue() -> nn.Module:
    """Return a model with a queue of inputs, the position of the next entry and the last input."""
    import torch
    from torch import nn

    class Model(nn.Linear):
        queue: Tensor
        place: Tensor
        last: Tensor

        def __init__(self) -> None:
            super().__init__(8, 3)
            self.register_buffer("queue", torch.zeros(4, 8))
            self.register_buffer("place", torch.zeros((), dtype=torch.long))
            self.register_buffer("last", torch.zeros(8, dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                self.queue[self.place] = x[0].detach()
                self.place.add_(1).remainder_(4)
                self.last = (x[0].detach() * 1000).long()
            return super().forward(x)

    return Model()


def build_teacher() -> nn.Module:
    """Return a model with a teacher, whose frozen weights follow the trained ones in forward."""
    import torch
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.student, self.teacher = nn.Linear(8, 3), nn.Linear(8, 3)
            self.teacher.requires_grad_(False)

        def forward(self, x: Tensor) -> Tensor:
            if self.training:
                with torch.no_grad():
                    pairs = zip(self.teacher.parameters(), self.student.parameters(), strict=True)
                    for slow, fast in pairs:
                        slow.lerp_(fast, 0.1)
            out: Tensor = self.student(x) + 0.1 * self.teacher(x)
            return out

    return Model()


def build_max_norm() -> nn.Module:
    """Return a model that rescales the rows of an embedding as it looks them up."""
    from torch import nn

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.out = nn.Embedding(50, 8, max_norm=1.0), nn.Linear(8, 3)

        def forward(self, x: Tensor) -> Tensor:
            out: Tensor = self.out(self.words((x.abs() * 10).long().clamp(max=49)).mean(1))
            return out

    return Model()


def build_equal() -> nn.Module:
    """Return a model whose buffers change equally on all ranks."""
    import torch
    from torch import nn

    class Model(nn.Module):
        calls: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.out = nn.utils.spectral_norm(nn.Linear(8, 3))
            self.register_buffer("calls", torch.zeros((), dtype=torch.long))

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            out: Tensor = self.out(x)
            return out

    return Model()


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


MODELS = {
    "mean": build_mean,
    "codebook": build_codebook,
    "clamped": build_clamped,
    "minima": build_minima,
    "queue": build_queue,
    "teacher": build_teacher,
    "max_norm": build_max_norm,
    "equal": build_equal,
}
