"""Compiled blocks of a model."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

from launcher.engine.model.blocks import checkpoint_activations, compile_blocks, find_blocks
from launcher.engine.state.compiled import is_compiled
from launcher.errors import RecipeError


class Own(nn.Module):
    """A block whose class torch does not define."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(8, 8)

    def forward(self, inputs: Tensor) -> Tensor:
        """Return values of the shape of the inputs."""
        outputs: Tensor = self.linear(inputs).relu()
        return outputs


@pytest.mark.parametrize(
    "block", [Own(), nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)]
)
def test_blocks_are_compiled(block: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler captures each block once, whoever defines its class, and keeps its results."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = nn.Sequential(*(copy.deepcopy(block) for _ in range(12)))
    inputs = torch.randn(2, 3, 8, requires_grad=True)
    expected = model(inputs)
    blocks = find_blocks(model, None)
    assert len(blocks) == 12
    assert not is_compiled(model)
    compile_blocks(model, blocks)
    assert is_compiled(model)
    counters.clear()
    outputs = model(inputs)
    outputs.sum().backward()
    torch.testing.assert_close(outputs, expected)
    assert counters["stats"]["unique_graphs"] == 1
    assert not counters["graph_break"]


def test_a_model_without_blocks_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """The compiler captures the whole model if nothing repeats, also a plain Sequential."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2))
    compile_blocks(model, find_blocks(model, None))
    counters.clear()
    model(torch.randn(3, 4)).sum().backward()
    assert counters["stats"]["unique_graphs"] == 1


@pytest.mark.filterwarnings("ignore:The .grad attribute:UserWarning")  # the compiler reads it
def test_compiled_blocks_recompute_their_activations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled blocks that recompute activations keep their gradients; BatchNorm is refused."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    expected = nn.Sequential(*(Own() for _ in range(3)))
    model = copy.deepcopy(expected)
    blocks = find_blocks(model, None)
    compile_blocks(model, blocks)
    checkpoint_activations(blocks)
    assert is_compiled(model)
    inputs = torch.randn(4, 8)
    for each in (model, expected):
        each(inputs).square().sum().backward()
    gradients = [weight.grad for weight in expected.parameters()]
    torch.testing.assert_close([weight.grad for weight in model.parameters()], gradients)
    normed = nn.Sequential(*(nn.Sequential(Own(), nn.BatchNorm1d(8)) for _ in range(2)))
    blocks = list(normed)
    checkpoint_activations(blocks)
    compile_blocks(normed, blocks)
    with pytest.raises(RecipeError, match="BatchNorm"):
        checkpoint_activations(blocks)
