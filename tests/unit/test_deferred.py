"""Models that are recorded without values and computed later, against the same built at once."""

from __future__ import annotations

import copy
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from support import ROOT
from torch import Tensor, nn

from launcher.engine.data.randomness import Generators, seed_all
from launcher.engine.model import replay
from launcher.engine.model.apparent_device import CannotDeferError
from launcher.engine.model.deferred import DeferredValues, defer
from launcher.engine.state.compiled import plain_name
from launcher.engine.state.initial_values import fragment, parts_of
from launcher.engine.state.meta_tensors import allocate, move_to_meta
from launcher.recipes.gpt import build_model as build_gpt
from launcher.recipes.resnet import build_resnet

sys.path.insert(0, str(ROOT / "tests" / "recipes"))

from tower import build_tower

MODELS: dict[str, Callable[[], Any]] = {}
"""Model functions that can be recorded."""


def model(function: Callable[[], Any]) -> Callable[[], Any]:
    """Add a function to the models that can be recorded."""
    MODELS[function.__name__] = function
    return function


MODELS |= {"gpt": build_gpt, "tower": build_tower, "lstm": lambda: nn.LSTM(4, 5, 2)}


@model
def resnet() -> Any:
    return build_resnet([1, 1], [8, 16], num_classes=10, stem="small")


@model
def encoder() -> Any:
    """Copies of one layer, which are initialised again."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    layer.register_buffer("mask", torch.rand(3))
    return nn.TransformerEncoder(layer, 3)


@model
def tied() -> Any:
    net: Any = nn.Sequential(nn.Embedding(10, 4, padding_idx=0), nn.Linear(4, 10, bias=False))
    net[1].weight = net[0].weight
    return net


@model
def initialised() -> Any:
    net: Any = nn.Sequential(*(nn.Linear(8, 6) for _ in range(4)))
    nn.init.orthogonal_(net[0].weight)
    nn.init.trunc_normal_(net[1].weight, std=0.2)
    nn.init.trunc_normal_(net[1].bias, mean=0.9, std=1.0, a=1.5, b=1.6)
    nn.init.sparse_(net[2].weight, 0.5)
    nn.init.kaiming_normal_(net[3].weight)
    with torch.no_grad():
        net[3].weight[2:4] = net[0].weight[:2] * 2
    return net


@model
def scaled() -> Any:
    """Parameters that are scaled when all have been drawn, and a copy of the model beside them."""
    net: Any = nn.Sequential(*(nn.Linear(20, 20) for _ in range(8)))
    for number, layer in enumerate(net):
        layer.weight.data.div_((2 * (number + 1)) ** 0.5)
    return nn.ModuleDict({"student": net, "teacher": copy.deepcopy(net)})


@model
def reading() -> Any:
    """A model function that reads values which are not random."""
    net: Any = nn.Sequential()
    for rate in [x.item() for x in torch.linspace(0, 0.5, 3)]:
        net.append(nn.Dropout(rate))
    sizes = torch.tensor([2, 3]).cumsum(0) + torch.ones(2, dtype=torch.int64)
    net.append(nn.Linear(*sizes.tolist()))
    if torch.equal(torch.ones(2), torch.zeros(2) + 1) and torch.zeros(2).device.type == "cpu":
        net.append(nn.Linear(*torch.arange(1, 5).numpy()[1:3].tolist()))
    return net


@model
def shaped_by_forward() -> Any:
    """A model whose last layer is sized by a forward pass, which updates statistics."""
    net: Any = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(0.2), nn.Flatten())
    net.append(nn.Linear(net(torch.randn(2, 3, 8, 8)).shape[1], 2))
    return net


@model
def generators() -> Any:
    """A model function that seeds generators, and saves and restores their states."""
    net: Any = nn.Sequential(nn.Linear(3, 3))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(5)
        net.append(nn.Linear(3, 3))
    net.append(nn.Linear(3, 3))
    own = torch.Generator().manual_seed(3)
    nn.init.normal_(net[0].weight, generator=own)
    state = torch.get_rng_state()
    net.append(nn.Linear(2, 2))
    torch.set_rng_state(state)
    net.append(nn.Linear(int(np.random.randint(2, 5)), random.randrange(2, 5)))
    nn.init.normal_(net[1].weight, generator=own)
    torch.manual_seed(9)
    return net


@model
def constants() -> Any:
    """Values from NumPy and from a state dict, beside drawn ones."""
    net: Any = nn.Sequential(nn.Embedding(4, 3), nn.Linear(3, 3))
    net[0].weight.data.copy_(torch.from_numpy(np.random.rand(4, 3)))
    net[0].weight.data[0] = torch.tensor([1.0, 2.0, 3.0])
    net[0].weight.data *= 2
    net.register_parameter("scale", nn.Parameter(torch.tensor([3.0])))
    net.register_buffer("mean", torch.tensor([0.5]) * 2)
    net.load_state_dict({name: value.clone() for name, value in net.state_dict().items()})
    return copy.deepcopy(net).half().cpu().to("cpu").double()


@model
def buffers() -> Any:
    net: Any = nn.Module()
    steps = 1.0 / (10000 ** (torch.arange(0, 8, 2).float() / 8))
    net.register_buffer("rotary", torch.polar(torch.ones(4), steps), persistent=False)
    net.register_buffer("mask", torch.ones(4, 4).tril().view(1, 1, 4, 4))
    net.register_buffer("positions", torch.arange(4).expand((1, -1)))
    net.linear = nn.Linear(2, 2)
    return net


@model
def weight_norm() -> Any:
    return nn.utils.parametrizations.weight_norm(nn.Linear(4, 5))


@model
def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 100, "n_positions": 16}
    return GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))


@model
def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, intermediate_size=64, vocab_size=100))


def tensors_of(net: nn.Module) -> dict[str, Tensor]:
    """Return the parameters and buffers by name."""
    named = (*net.named_parameters(), *net.named_buffers())
    return {plain_name(name): tensor for name, tensor in named}


def fill(net: nn.Module, values: DeferredValues) -> None:
    """Give a recorded model its values, on the CPU."""
    assert all(tensor.is_meta for tensor in tensors_of(net).values())
    allocate(net, torch.device("cpu"))
    values.fill(parts_of(net))


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_recorded_model_gets_its_values(name: str) -> None:
    """Parameters, buffers and generators are to the bit those of a model built at once."""
    seed_all(3)
    expected = MODELS[name]()
    generators = Generators()
    seed_all(3)
    net, values = defer(MODELS[name])
    fill(net, values)
    assert generators.are_untouched()
    assert tensors_of(net).keys() == tensors_of(expected).keys()
    for key, tensor in tensors_of(expected).items():
        found = tensors_of(net)[key]
        assert torch.equal(found, tensor), key
        assert (found.dtype, found.requires_grad) == (tensor.dtype, tensor.requires_grad)
    assert list(net.state_dict()) == list(expected.state_dict())


def test_attributes_get_their_values() -> None:
    """Tensors that a module keeps without registering them are computed as well."""

    def build() -> Any:
        net: Any = nn.Linear(3, 3)
        net.steps, net.noise = torch.arange(5) / 7, [torch.rand(3)]
        return net

    seed_all(3)
    expected: Any = build()
    seed_all(3)
    net: Any
    net, values = defer(build)
    fill(net, values)
    assert torch.equal(net.steps, expected.steps)
    assert torch.equal(net.noise[0], expected.noise[0])


def test_parameters_stay_the_same_objects() -> None:
    """A list of parameters that the model keeps holds those that get values."""

    def build() -> Any:
        net: Any = nn.Linear(3, 3)
        net.slow = [net.weight]
        return net

    net: Any
    net, values = defer(build)
    fill(net, values)
    assert net.slow[0] is net.weight
    assert net.weight.device.type == "cpu"


cache: list[Tensor] = []


def read_random() -> Any:
    return nn.Dropout(float(torch.rand(())) / 2)


def keep_elsewhere() -> Any:
    cache.append(torch.rand(3))
    return nn.Linear(2, 2)


def ask_for_meta() -> Any:
    return nn.Linear(2, 2, device="meta")


def change_array() -> Any:
    net: Any = nn.Linear(2, 2)
    net.bias.detach().numpy()[:] = 1
    return net


def change_constant() -> Any:
    net, table = nn.Embedding(600, 600), torch.from_numpy(np.ones((600, 600), np.float32))
    net.weight.data.copy_(table)
    table += 1
    return net


def draw_into_constant() -> Any:
    net: Any = nn.Linear(2, 2)
    net.bias = nn.Parameter(torch.tensor([1.0, 2.0]).normal_())
    return net


NOT_RECORDED = [
    read_random,
    keep_elsewhere,
    ask_for_meta,
    change_array,
    change_constant,
    draw_into_constant,
    lambda: nn.LazyLinear(3),
    lambda: nn.Linear(2, 2, device="cuda"),
    lambda: 1 / 0,
]


@pytest.mark.parametrize("function", NOT_RECORDED)
def test_what_cannot_be_recorded_is_refused(function: Callable[[], Any]) -> None:
    """A function whose values would differ is not recorded, and torch's generator is untouched."""
    state = torch.get_rng_state()
    with pytest.raises(CannotDeferError):
        defer(function)
    assert torch.equal(torch.get_rng_state(), state)
    cache.clear()
    assert nn.Linear(2, 2).weight.device.type == "cpu"


class Peak(replay._Memory):
    """Memory that notes how many bytes it held at most."""

    highest = 0

    def storage(self, number: int) -> torch.UntypedStorage:
        found = super().storage(number)
        self._note()
        return found

    def put(self, view: Any, result: Tensor) -> None:
        super().put(view, result)
        self._note()

    def _note(self) -> None:
        held = sum(storage.nbytes() for storage in self._storages.values())
        Peak.highest = max(Peak.highest, held)


@pytest.mark.parametrize("name", ["gpt", "initialised", "scaled", "gpt2", "llama"])
def test_few_parameters_are_in_memory(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """At most three times the largest parameter is in memory, also if all are drawn twice."""
    monkeypatch.setattr(replay, "_Memory", Peak)
    Peak.highest = 0
    net, values = defer(MODELS[name])
    largest = max(p.nbytes for p in net.parameters())
    total = sum(p.nbytes for p in net.parameters())
    fill(net, values)
    assert largest <= Peak.highest <= 3 * largest
    assert Peak.highest < total


def test_only_what_is_asked_for_is_computed() -> None:
    """If parameters come from elsewhere, nothing is drawn, and buffers get their values."""
    seed_all(3)
    expected = tensors_of(MODELS["llama"]())
    net, values = defer(MODELS["llama"])
    state = torch.get_rng_state()
    allocate(net, torch.device("cpu"))
    buffers = dict(net.named_buffers())
    values.fill({name: part for name, part in parts_of(net).items() if name in buffers})
    assert buffers
    assert torch.equal(torch.get_rng_state(), state)
    for name, buffer in buffers.items():
        assert torch.equal(buffer, expected[name])


def test_parts_are_filled() -> None:
    """A part receives the elements of its own boxes."""
    _, values = defer(MODELS["tied"])
    seed_all(3)
    memory = torch.zeros(13)
    part = fragment(torch.Size((10, 4)), memory, 29)
    values.fill({"0.weight": part})
    seed_all(3)
    full = MODELS["tied"]()[0].weight.detach()
    assert torch.equal(memory[:11], full.flatten()[29:])
    assert memory[11:].tolist() == [0.0, 0.0]


def test_a_model_with_values_can_be_moved_to_meta() -> None:
    """Shared parameters stay shared, and keep their attributes."""
    net = MODELS["tied"]()
    net[0].weight.note = 5
    move_to_meta(net)
    assert net[0].weight is net[1].weight
    assert net[0].weight.is_meta
    assert net[0].weight.note == 5
