"""Orders of samples: permutations of every epoch, equal on all ranks and however they are asked."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset

from launcher import Recipe, RecipeError, make_plan, read_machine
from launcher.engine.data.order import (
    BLOCK,
    GlobalOrder,
    LengthOrder,
    Order,
    OrderRequest,
    Shuffle,
    WindowOrder,
    chunks_of,
    look_up,
    order_of,
)
from launcher.engine.data.permutation import Permutation
from launcher.engine.data.sampler import Sampler

CHUNKS = [40, 25, 60, 1, 33, 41]
LENGTHS = np.random.default_rng(0).integers(1, 500, 200)
ORDERS: dict[str, Callable[[], Order]] = {
    "global": lambda: GlobalOrder(200, 7),
    "window": lambda: WindowOrder(CHUNKS, 48, 7),
    "length": lambda: LengthOrder(LENGTHS, 64, 12, 7),
}
REQUEST = OrderRequest(seed=0, window=64, batch_size=12, total_positions=600)


class Stored:
    """A data set of a thousand numbers that says how it lies."""

    def __init__(self, chunks: Any) -> None:
        self.chunks = chunks

    def __len__(self) -> int:
        return 1000

    def __getitem__(self, index: int) -> int:
        return index


@pytest.mark.parametrize("name", ORDERS)
def test_an_epoch_is_a_permutation_of_its_own(name: str) -> None:
    """Each epoch has every sample once, in another order than the epoch before."""
    order = ORDERS[name]()
    epochs = [look_up(order, epoch, [range(200)])[0] for epoch in range(3)]
    assert all(sorted(epoch) == list(range(200)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(sorted(ORDERS)), st.lists(st.integers(0, 199), min_size=1), st.integers(0, 9)
)
def test_a_position_does_not_depend_on_what_was_asked_before(
    name: str, positions: list[int], epoch: int
) -> None:
    """A position has the same sample in any lookup, by an order of any history."""
    whole = ORDERS[name]().elements_at(epoch, np.arange(200))
    order = ORDERS[name]()
    order.elements_at(epoch + 1, np.array(positions))
    assert order.elements_at(epoch, np.array(positions)).tolist() == whole[positions].tolist()


@settings(max_examples=40, deadline=None)
@given(st.lists(st.integers(1, 30), min_size=1, max_size=20), st.integers(1, 100))
def test_chunks_and_windows_of_any_size_give_a_permutation(chunks: list[int], window: int) -> None:
    """The windowed order is a permutation for any chunks and windows."""
    order = WindowOrder(chunks, window, 3)
    samples = sum(chunks)
    assert sorted(order.elements_at(1, np.arange(samples)).tolist()) == list(range(samples))


def test_a_window_reads_few_chunks() -> None:
    """A window of 256 samples of chunks of 128 has samples of at most 3 chunks, 2 on average."""
    order = WindowOrder([128] * 64, 256, 1)
    windows = order.elements_at(0, np.arange(64 * 128)).reshape(-1, 256) // 128
    assert {len(np.unique(window)) for window in windows} == {2}
    assert len({tuple(np.unique(window)) for window in windows}) == 32


def test_batches_have_similar_lengths() -> None:
    """Padding to the longest of a batch wastes 45 % in a random order, and 5 % by length."""
    lengths = np.random.default_rng(1).integers(10, 500, 2000)

    def waste(order: Order) -> float:
        batches = lengths[order.elements_at(0, np.arange(2000))].reshape(-1, 20)
        return 1 - float(lengths.sum() / (batches.max(axis=1) * 20).sum())

    assert waste(GlobalOrder(2000, 0)) > 0.4
    assert waste(LengthOrder(lengths, 1000, 20, 0)) < 0.05
    order = LengthOrder(lengths, 1000, 20, 0)
    firsts = [lengths[order.elements_at(epoch, np.arange(20))].mean() for epoch in range(8)]
    assert max(firsts) > 2 * min(firsts)


@pytest.mark.parametrize("name", ORDERS)
def test_ranks_share_the_batches_of_one_rank(name: str) -> None:
    """On 1, 2, 3 and 5 ranks, the ranks together read the samples of each step, in order."""
    recipe = Recipe(
        name="ordered",
        model=lambda: None,
        data=lambda: None,  # type: ignore[arg-type,return-value]
        loss=lambda outputs, batch: (outputs, batch),
        batch_size=12,
        lr=0.1,
        lr_rule="none",
        epochs=2,
        train_samples=200,
        device="cpu",
    )
    machine = read_machine()
    steps = []
    for ranks in (1, 2, 3, 5):
        plan = make_plan(recipe, machine, nproc_per_node=ranks)
        samplers = [
            Sampler(plan=plan, rank=rank, train_samples=200, order=ORDERS[name]())
            for rank in range(ranks)
        ]
        streams = [sampler.requests(first_step=5) for sampler in samplers]
        steps.append(
            [
                [
                    index
                    for sampler, stream in zip(samplers, streams, strict=True)
                    for _ in range(sampler.micro_steps(step))
                    for request in [next(stream)]
                    if request.has_weight
                    for index in request.indices
                ]
                for step in range(5, plan.total_steps)
            ]
        )
        assert steps[-1] == [samplers[0].batch_ids(step) for step in range(5, plan.total_steps)]
    assert steps[0] == steps[1] == steps[2] == steps[3]


def test_chunks_come_from_the_data() -> None:
    """Chunks are those of the data set, of its parts, or blocks; empty chunks are left out."""
    assert chunks_of(Stored([400, 0, 600]), 1000).tolist() == [400, 600]
    assert chunks_of(Stored(None), 1000).tolist() == [1000]
    assert chunks_of(range(2500), 2500).tolist() == [BLOCK, BLOCK, 2500 - 2 * BLOCK]
    joined: Any = ConcatDataset([Stored([400, 600]), Stored(None)])  # type: ignore[list-item]
    assert chunks_of(joined, 2000).tolist() == [400, 600, 1000]


def test_an_order_follows_the_settings() -> None:
    """The settings choose the order, and the global one is that of earlier versions."""
    before = Permutation(1000, 0, 2)(np.arange(1000))
    orders = {
        shuffle: order_of(
            Stored([500, 500]), 1000, replace(REQUEST, shuffle=shuffle), np.arange(1000)
        ).elements_at(2, np.arange(1000))
        for shuffle in get_args(Shuffle)
    }
    assert (orders["global"] == before).all()
    assert len({tuple(order) for order in orders.values()}) == 3


@pytest.mark.parametrize(
    ("chunks", "lengths", "words"),
    [
        ([400, 500], None, ["chunks", "900", "1,000"]),
        ([1100, -100], None, ["chunks", "-100"]),
        ("all", None, ["chunks", "str"]),
        (None, None, ["Data(lengths=...)"]),
        (None, [1.5] * 1000, ["Data(lengths=...)", "fractions"]),
        (None, [1] * 999, ["999", "1,000"]),
    ],
)
def test_what_cannot_be_ordered_is_refused(chunks: Any, lengths: Any, words: list[str]) -> None:
    """Chunks that do not add up, and lengths that are missing or wrong, are refused by name."""
    shuffle: Shuffle = "window" if chunks is not None else "length"
    with pytest.raises(RecipeError) as error:
        order_of(Stored(chunks), 1000, replace(REQUEST, shuffle=shuffle), lengths)
    assert all(word in str(error.value) for word in words)
