"""Packing documents into samples of a fixed number of tokens."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.data import default_collate

from launcher import Packed, RecipeError, SampleError, attention_mask, cumulative_lengths
from launcher.engine.data.packed import best_fit

LENGTHS = np.random.default_rng(0).integers(1, 60, 300)
DOCUMENTS = [np.arange(length) + 1000 * number for number, length in enumerate(LENGTHS)]


def documents_of(packed: Packed) -> list[list[int]]:
    """Return the documents in all samples, by their boundaries."""
    found = []
    for index in range(len(packed)):
        sample = packed[index]
        for number in range(1, int(sample["document_ids"].max()) + 1):
            inside = sample["document_ids"] == number
            assert sample["position_ids"][inside].tolist() == list(range(inside.sum()))
            ids = sample["input_ids"][inside].tolist()
            assert sample["targets"][inside].tolist() == [*ids[1:], -100]
            found.append(ids)
        padding = sample["document_ids"] == 0
        assert set(sample["targets"][padding].tolist()) <= {-100}
        assert sample["position_ids"][padding].tolist() == list(range(padding.sum()))
    return found


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=80))
def test_every_item_is_in_one_bin(sizes: list[int]) -> None:
    """Bins hold each item once and nothing above their capacity, and two never fit into one."""
    bins = best_fit(sizes, 50)
    assert sorted(item for each in bins for item in each) == list(range(len(sizes)))
    loads = sorted(sum(sizes[item] for item in each) for each in bins)
    assert loads[-1] <= 50
    assert len(loads) == 1 or loads[0] + loads[1] > 50


def test_documents_are_kept_whole() -> None:
    """Every document is in one sample, with positions and targets of its own."""
    packed = Packed(DOCUMENTS, tokens=64, window=100)
    assert sorted(documents_of(packed)) == [each.tolist() for each in DOCUMENTS]
    assert packed.waste < 0.08
    assert packed.waste_unpacked > 0.5
    assert packed.waste == pytest.approx(1 - LENGTHS.sum() / (64 * len(packed)))


def test_long_documents_are_split_or_cut() -> None:
    """Pieces of a long document are documents of their own; cutting drops its end."""
    document = list(range(150))
    split = Packed([document, [7, 8]], tokens=64, long="split")
    assert sorted(documents_of(split)) == [
        document[:64],
        [7, 8],
        document[64:128],
        document[128:],
    ]
    assert sorted(documents_of(Packed([document], tokens=64, long="cut"))) == [document[:64]]


def test_packing_depends_on_the_seed_alone() -> None:
    """Two processes pack alike, however lengths are given; another seed packs otherwise."""
    mappings = [{"input_ids": torch.from_numpy(each)} for each in DOCUMENTS]
    texts = [{"text": each.tolist()} for each in DOCUMENTS]
    packs = [
        Packed(DOCUMENTS, LENGTHS, tokens=64),
        Packed(mappings, tokens=64),
        Packed(texts, tokens=64, read=lambda sample: sample["text"]),
    ]
    assert len({packed.fingerprint() for packed in packs}) == 1
    assert all((packed[3]["input_ids"] == packs[0][3]["input_ids"]).all() for packed in packs)
    assert Packed(DOCUMENTS, tokens=64, seed=1).fingerprint() != packs[0].fingerprint()


def test_attention_stays_inside_documents() -> None:
    """Attention with the mask of a packed batch equals attention over each document alone."""
    batch = default_collate([Packed(DOCUMENTS, tokens=64)[index] for index in (0, 1)])
    query, key, value = torch.randn(3, 2, 1, 64, 8, generator=torch.Generator().manual_seed(0))
    mask = attention_mask(batch["document_ids"])
    packed = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    starts = cumulative_lengths(batch["position_ids"]).tolist()
    assert starts[0] == 0
    assert starts[-1] == 128
    assert 64 in starts
    flat = [each.transpose(0, 1).reshape(1, 1, 128, 8) for each in (query, key, value)]
    flat_packed = packed.transpose(0, 1).reshape(128, 8)
    for start, stop in itertools.pairwise(starts):
        one, two, three = (each[:, :, start:stop] for each in flat)
        expected = functional.scaled_dot_product_attention(one, two, three, is_causal=True)
        torch.testing.assert_close(flat_packed[start:stop], expected[0, 0])


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Packed(DOCUMENTS, tokens=20), ["tokens", "long='split'"]),
        (lambda: Packed(DOCUMENTS, [1, 2], tokens=64), ["2", "300"]),
        (lambda: Packed([[]], tokens=4), ["empty"]),
        (lambda: Packed([[0.5]], tokens=4), ["read=..."]),
        (lambda: Packed([[1]], tokens=0), ["tokens=0"]),
        (lambda: Packed([[1]], long="drop"), ["drop"]),  # type: ignore[arg-type]
    ],
)
def test_what_cannot_be_packed_is_refused(make: Callable[[], Any], words: list[str]) -> None:
    """Documents that are too long, empty or of another kind are refused, by their number."""
    with pytest.raises(RecipeError) as error:
        make()
    assert all(word in str(error.value) for word in words)


def test_a_wrong_length_is_found_when_the_document_is_read() -> None:
    """A document of another length than was given is refused with both numbers."""
    with pytest.raises(SampleError, match="document 0 has 3 tokens, and its length was 2"):
        Packed([[1, 2, 3]], [2], tokens=4)[0]
