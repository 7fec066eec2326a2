"""Mixtures and weighted data sets: exact proportions, in an order that needs no history."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_runs
from torch.utils.data import TensorDataset

from launcher import Data, Mixture, RecipeError, Source, weighted
from launcher.engine.data.mixture import MixtureOrder
from launcher.engine.data.order import OrderRequest
from launcher.errors import CheckpointError
from launcher.runs.job import ResumeFrom

REQUEST = OrderRequest(seed=3, window=64, batch_size=12, total_positions=60_000)
WEIGHTS = (0.7, 0.25, 0.05)


def order_of_mixture(mixture: Mixture, **changes: Any) -> MixtureOrder:
    """Return the order of a mixture in a run."""
    order = mixture.make_order(replace(REQUEST, **changes))
    assert isinstance(order, MixtureOrder)
    return order


def three() -> Mixture:
    """Return a mixture of three ranges with the weights above."""
    sizes = (1000, 300, 50)
    return Mixture([Source(range(n), weight=w) for n, w in zip(sizes, WEIGHTS, strict=True)])


def sources_over(mixture: Mixture, epochs: int, **changes: Any) -> np.ndarray[Any, Any]:
    """Return the source at each position of some epochs, after checking the counts of each."""
    order, places = order_of_mixture(mixture, **changes), np.arange(len(mixture))
    pairs = [order.sources_at(epoch, places) for epoch in range(epochs)]
    sources, counts = (np.concatenate(each) for each in zip(*pairs, strict=True))
    for source in np.unique(sources):
        own = counts[sources == source]
        assert (own == np.arange(len(own))).all()
    return sources


def test_proportions_hold_over_every_window() -> None:
    """In every window of 100 positions or more, counts differ from their shares by at most 8."""
    sources = sources_over(three(), 10)
    for source, weight in enumerate(WEIGHTS):
        errors = np.concatenate([[0], np.cumsum(sources == source)]) - weight * np.arange(
            len(sources) + 1
        )
        assert np.abs(errors).max() < 4.5
        assert np.abs(errors[::16][:84]).max() <= 1  # at the ends of blocks
        for size in (100, 256, 1350):
            assert np.abs(errors[size:] - errors[:-size]).max() < 8


def test_without_weights_an_epoch_takes_each_sample_as_often_as_its_repeat() -> None:
    """Without weights, every epoch is exactly each source's samples, repeated and limited."""
    mixture = Mixture(
        {
            "a": Source(range(1000)),
            "b": Source(range(301), repeat=3),
            "c": Source([7] * 50, limit=9),
        }
    )
    assert len(mixture) == 1000 + 903 + 9
    order = order_of_mixture(mixture)
    for epoch in range(3):
        samples = order.elements_at(epoch, np.arange(len(mixture)))
        assert len(np.unique(samples)) == len(mixture)
        counts = np.bincount(samples % 1310, minlength=1310)
        assert set(counts[:1000]) == {1}
        assert set(counts[1000:1301]) == {3}
        assert set(counts[1301:]) == {1}


def test_a_source_goes_on_in_its_own_epochs() -> None:
    """Over several epochs of a mixture, a source is read in whole passes, each in a new order."""
    mixture = three()
    order, places = order_of_mixture(mixture), np.arange(len(mixture))
    samples = np.concatenate([order.elements_at(epoch, places) for epoch in range(6)])
    total = 1350
    own = samples[(samples % total >= 1000) & (samples % total < 1300)] - 1000
    passes = own[: len(own) // 300 * 300].reshape(-1, 300)
    assert len(passes) >= 6
    for number, each in enumerate(passes):
        assert sorted(each.tolist()) == [index + total * number for index in range(300)]
    assert passes[0].tolist() != (passes[1] - total).tolist()


def test_weights_follow_the_progress_of_the_run() -> None:
    """Weights that change linearly give each tenth of the run its mean proportion within 0.1 %."""
    mixture = Mixture(
        [Source(range(1000), weight=[(0, 1), (1, 0)]), Source(range(500), weight=[(0, 0), (1, 1)])]
    )
    sources = sources_over(mixture, 40)
    tenths = sources.reshape(10, -1).mean(axis=1)
    assert np.abs(tenths - (np.arange(10) + 0.5) / 10).max() < 1e-3


@pytest.mark.parametrize("shuffle", ["global", "window"])
@pytest.mark.parametrize(
    "make",
    [
        three,
        lambda: Mixture(
            [Source(range(40), weight=[(0.2, 1), (0.6, 3)]), Source([1] * 7, weight=1)]
        ),
        lambda: weighted(range(50), np.arange(50)),
    ],
    ids=["constant", "curriculum", "weighted"],
)
def test_a_position_needs_no_history(make: Callable[[], Any], shuffle: str) -> None:
    """A position has the same sample alone as in a lookup of the whole epoch."""
    data = make()
    request = replace(REQUEST, shuffle=shuffle)  # type: ignore[arg-type]
    if shuffle == "window" and not isinstance(data, Mixture):
        return
    whole = data.make_order(request).elements_at(4, np.arange(len(data)))
    order = data.make_order(request)
    for position in (len(data) - 1, 0, 17, 3):
        assert order.elements_at(4, np.array([position])).tolist() == [whole[position]]


def test_samples_of_a_mixture_are_those_of_its_sources() -> None:
    """A number stands for a sample of a source, in any pass; several are read together."""
    mixture = Mixture([Source([10, 11, 12], weight=1), Source([20, 21], weight=1)])
    assert [mixture[index] for index in range(5)] == [10, 11, 12, 20, 21]
    assert mixture[5 + 3] == 20
    assert mixture.__getitems__([4, 0, 9, 6]) == [21, 10, 21, 11]


def test_weights_of_samples_are_exact_in_every_epoch() -> None:
    """A sample occurs as often as its weight says, rounded, over 20 epochs within 3."""
    weights = np.random.default_rng(0).random(500)
    weights[[3, 100]] = 0
    order = weighted(range(500), weights).make_order(REQUEST)
    shares, total = weights / weights.sum() * 500, np.zeros(500)
    for epoch in range(20):
        samples = order.elements_at(epoch, np.arange(500))
        assert len(np.unique(samples)) == 500
        counts = np.bincount(samples % 500, minlength=500)
        assert np.abs(counts - shares).max() < 1
        total += counts
    assert np.abs(total - 20 * shares).max() < 3
    assert total[3] == total[100] == 0


def test_groups_are_balanced_to_one_sample() -> None:
    """With weights of 1 / class size, an epoch of 500 has 166 or 167 samples of each class."""
    labels = np.random.default_rng(0).choice(3, 500, p=[0.8, 0.15, 0.05])
    weights = 1 / np.bincount(labels)[labels]
    order = weighted(range(500), weights, groups=labels).make_order(REQUEST)
    for epoch in range(5):
        samples = order.elements_at(epoch, np.arange(500)) % 500
        assert set(np.bincount(labels[samples])) == {166, 167}


def mixed(limit: int = 30) -> Data:
    """Return a mixture of the samples of `small_runs`, 40 per epoch."""
    inputs = small_runs.INPUTS
    curve = [(0.0, 1.0), (1.0, 3.0)]
    parts = [TensorDataset(inputs[:limit]), TensorDataset(inputs[30:40])]
    return Data(
        train=Mixture(
            [Source(parts[0], weight=2), Source(parts[1], weight=curve)],
            samples=40,
        )
    )


def samples_of(run: Path) -> list[list[int]]:
    """Return the samples of each step that a run has recorded."""
    lines = (run / "samples" / "rank0.jsonl").read_text().splitlines()
    batches = [json.loads(line)["micro_batches"] for line in lines]
    return [[index for batch in step for index in batch] for step in batches]


def test_a_run_resumes_in_the_middle_of_a_mixture(tmp_path: Path) -> None:
    """A run that stops after 2 of 6 steps and resumes reads what an uninterrupted one reads."""
    recipe = small_runs.recipe(data=mixed, record_samples=True)
    whole = samples_of(small_runs.train(tmp_path / "whole", recipe).path)
    run = small_runs.train(tmp_path / "parts", recipe, stop_at=2)
    small_runs.train(tmp_path / "parts", recipe, ResumeFrom())
    assert samples_of(run.path) == whole
    assert len(whole) == 6
    changed = replace(recipe, data=lambda: mixed(limit=29))
    with pytest.raises(CheckpointError, match="mixture"):
        small_runs.train(tmp_path / "parts", changed, ResumeFrom())


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Mixture([]), ["at least one source"]),
        (lambda: Mixture([range(3)]), ["source 0", "launcher.Source"]),  # type: ignore[list-item]
        (lambda: Mixture([Source([])]), ["source 0", "empty"]),
        (lambda: Mixture([Source(iter([1]))]), ["source 0", "__len__"]),
        (lambda: Mixture([Source([1], weight=-1)]), ["source 0", "-1"]),
        (lambda: Mixture([Source([1], weight=float("nan"))]), ["nan"]),
        (lambda: Mixture({"web": Source([1], weight=0)}), ["0", "0%"]),
        (lambda: Mixture([Source([1], weight=[(0, 1), (1, 0)])]), ["100%"]),
        (lambda: Mixture([Source([1], weight=[(0.5, 1), (0.2, 2)])]), ["0.5, 0.2"]),
        (lambda: Mixture([Source([1], weight="much")]), ["'much'"]),  # type: ignore[arg-type]
        (lambda: Mixture([Source([1], weight=1), Source([1])]), ["source 1", "no weight"]),
        (lambda: Mixture([Source([1], weight=1, repeat=2)]), ["repeat=2"]),
        (lambda: Mixture([Source([1], limit=0)]), ["limit=0"]),
        (lambda: Mixture([Source([1], repeat=0)]), ["repeat=0"]),
        (lambda: Mixture([Source([1])], samples=0), ["samples=0"]),
        (lambda: Mixture([Source(three())]), ["source 0", "Mixture"]),
        (lambda: weighted([1, 2], [1, -1]), ["sample 1", "-1"]),
        (lambda: weighted([1, 2], [0, 0]), ["all 2 weights are 0"]),
        (lambda: weighted([1, 2], [1]), ["1", "2"]),
        (lambda: weighted([1, 2], ["a", "b"]), ["numbers"]),
        (lambda: weighted([1, 2], [1, 2], groups=[1]), ["groups"]),
        (lambda: three().make_order(replace(REQUEST, shuffle="length")), ["shuffle=length"]),
        (
            lambda: mixed().train.make_order(replace(REQUEST, is_timed=True)),
            ["max_time"],
        ),
        (
            lambda: weighted([1], [1]).make_order(replace(REQUEST, shuffle="window")),
            ["shuffle=window"],
        ),
    ],
)
def test_what_cannot_be_mixed_is_refused(make: Callable[[], Any], words: list[str]) -> None:
    """Sources, weights and orders that make no sense are refused, with their name and value."""
    with pytest.raises(RecipeError) as error:
        make()
    assert all(word in str(error.value) for word in words)
