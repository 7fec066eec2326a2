"""The sum of the gradients of virtual ranks on one process."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from launcher import Data, Recipe, make_plan, read_machine, sgd
from launcher.engine.backends import devices, exact
from launcher.engine.backends.exact import ExactLocalBackend, add_gradients
from launcher.planning.virtual_ranks import Part, TreeSum

SIZES = 5, 3
"""Sizes of the parameters of the model."""

Given = tuple[Tensor | None, ...]
"""The gradient that a micro-batch gives each parameter; None does not use it."""


class Two(nn.Module):
    """Two vectors of parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.vectors = nn.ParameterList([nn.Parameter(torch.zeros(size)) for size in SIZES])


@pytest.fixture(autouse=True)
def _other_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(devices, "use_deterministic_kernels", lambda: None)  # of this process
    monkeypatch.setattr(exact, "keep_freed_memory", lambda: None)


def no_data() -> Data:
    raise NotImplementedError


def summed(parts: Sequence[Sequence[Given]]) -> list[Tensor]:
    """Return the gradients after a step, given those of the micro-batches of each part.

    A part without micro-batches has no samples.
    """
    recipe = Recipe(
        name="two", model=Two, data=no_data, loss=lambda *_: (0, 1), optimizer=sgd(),
        batch_size=64, lr=1.0, lr_rule="none", steps=1, device="cpu",
        virtual_ranks=len(parts), exact=True,
    )  # fmt: skip
    backend = ExactLocalBackend(recipe, make_plan(recipe, read_machine(), nproc_per_node=1))
    model, _ = backend.prepare(Two(), [], lambda model: torch.optim.SGD(model.parameters()))
    parameters = list(model.parameters())
    for leaf, micro_batches in enumerate(parts):
        for number, given in enumerate(micro_batches or [tuple(map(torch.ones, SIZES))]):
            part = Part(leaf, number, number >= len(micro_batches) - 1, not micro_batches)
            with backend.micro_step(last=leaf == len(parts) - 1 and part.is_last, part=part):
                terms = [
                    (parameter * gradient).sum()
                    for parameter, gradient in zip(parameters, given, strict=True)
                    if gradient is not None
                ]
                torch.autograd.backward(torch.stack(terms).sum())
    return backend._tree.take()


def expected(parts: Sequence[Sequence[Given]]) -> list[Tensor]:
    """Return the same sums, each part on its own."""
    tree: TreeSum[list[Tensor]] = TreeSum(len(parts), add_gradients)
    for leaf, micro_batches in enumerate(parts):
        gradients: list[Tensor | None] = [None for _ in SIZES]
        for given in micro_batches:
            for index, gradient in enumerate(given):
                held = gradients[index]
                if gradient is not None:
                    gradients[index] = gradient.clone() if held is None else held + gradient
        zeros = map(torch.zeros, SIZES)
        tree.push(leaf, [z if g is None else g for g, z in zip(gradients, zeros, strict=True)])
    return tree.take()


@pytest.mark.parametrize("seed", range(30))
def test_siblings_that_autograd_adds_have_the_bits_of_the_tree(seed: int) -> None:
    """Sums over parts equal those of the tree, with unused parameters and parts of any length."""
    generator = torch.Generator().manual_seed(seed)

    def random(size: int) -> Tensor | None:
        if torch.rand((), generator=generator) < 0.4:
            return None
        values = torch.randn(size, generator=generator)
        values[torch.rand(size, generator=generator) < 0.85] = -0.0
        return values

    def micro_batch() -> Given:
        given = tuple(map(random, SIZES))
        return given if any(one is not None for one in given) else tuple(map(torch.ones, SIZES))

    num_parts = int(torch.randint(1, 9, (), generator=generator))
    lengths = torch.randint(0, 3, (num_parts,), generator=generator).tolist()
    parts = [[micro_batch() for _ in range(length)] for length in lengths]
    for gradient, reference in zip(summed(parts), expected(parts), strict=True):
        assert torch.equal(gradient.view(torch.int32), reference.view(torch.int32))


@pytest.mark.parametrize("unused", [0, 1])
def test_a_sum_of_zeros_has_the_sign_that_the_tree_gives_it(unused: int) -> None:
    """The zeros of a part that does not use a parameter are added to the -0.0 of its sibling."""
    negative_zeros = tuple(-torch.zeros(size) for size in SIZES)
    parts: list[list[Given]] = [[negative_zeros], [negative_zeros]]
    parts[unused] = [(None, negative_zeros[1])]
    first, second = summed(parts)
    assert not first.signbit().any()
    assert second.signbit().all()
