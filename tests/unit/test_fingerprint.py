"""Tests of the descriptions of samples and of their comparison."""

from __future__ import annotations

import json
import threading
from collections import UserDict
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import Subset

from launcher.engine.data.fingerprint import (
    are_equal,
    describe,
    describe_classes,
    first_difference,
    format_description,
)

NAN = float("nan")


@dataclass
class Pair:
    """A user-defined sample."""

    x: Any
    y: Any = 0


def values() -> list[Any]:
    """Return newly created values of all kinds."""
    generator = torch.Generator().manual_seed(1)
    return [
        None,
        True,
        3,
        2**70,
        1.5,
        NAN,
        float("inf"),
        "a word",
        "a text " * 100,
        b"\x00\xff" * 99,
        [1, [2, (3, None)]],
        list(range(1000)),
        {"x": 1, 7: "seven"},
        UserDict(ids=torch.arange(50)),
        {"a", "b", "c"},
        Pair(torch.tensor([NAN, 1.0])),
        torch.randn(3, 4, generator=generator),
        torch.randn(3, 64, 64, generator=generator, dtype=torch.float64),
        torch.randint(0, 256, (3, 32, 32), generator=generator).to(torch.uint8),
        torch.tensor([1.0, 2.0]).to(torch.bfloat16),
        torch.tensor([1 + 2j, NAN]),
        torch.tensor(5),
        torch.tensor([]),
        torch.tensor([True, False]),
        torch.eye(3).to_sparse(),
        np.float32(2.5),
        np.arange(200),
        np.array(["one", "two"]),
        np.array([None, Pair(1)], dtype=object),
        np.array(["2020-01-01", "NaT"], dtype="datetime64[D]"),
    ]


INDICES = range(len(values()))


@pytest.mark.parametrize("index", INDICES)
def test_a_value_agrees_with_its_copy_and_no_other_value(index: int) -> None:
    """A value agrees with a copy, also after a round trip through JSON, and with no other value."""
    value, copy = values()[index], values()[index]
    saved = json.loads(json.dumps(describe(value), allow_nan=False))
    assert first_difference(saved, describe(copy)) is None
    assert are_equal(value, copy)
    for other in INDICES:
        if other != index:
            assert first_difference(saved, describe(values()[other])) is not None, (index, other)
            assert not are_equal(value, values()[other])


@pytest.mark.parametrize(
    ("one", "other", "place"),
    [
        ((torch.ones(3), 4), (torch.ones(3), 5), "[1]"),
        ({"a": [1, {"b": "x"}]}, {"a": [1, {"b": "y"}]}, "['a'][1]['b']"),
        (Pair(1, 2), Pair(1, 3), "['y']"),
        (torch.ones(3), torch.ones(3, dtype=torch.float64), ""),
        (torch.ones(4), torch.ones(2, 2), ""),
        (torch.ones(4), torch.full((4,), 1.01), ""),
        (np.arange(100), np.arange(100)[::-1], ""),
        (np.zeros(900), np.arange(900) * (np.arange(900) > 500), ""),
        ("x" * 99 + "a", "x" * 99 + "b", ""),
        ([1] * 999 + [2], [1] * 999 + [3], ""),
        (1, True, ""),
        (1, 1.0, ""),
    ],
)
def test_a_difference_has_its_place(one: Any, other: Any, place: str) -> None:
    """A difference reports its indices and distinct texts, and `are_equal` detects it too."""
    result = first_difference(describe(one), describe(other))
    assert result is not None
    assert result.place == place
    assert result.one != result.other, "a message must show what differs"
    assert not are_equal(one, other)


def test_images_agree_within_the_tolerance_of_decoders() -> None:
    """Descriptions of images that differ by one per pixel agree; those of other images do not."""
    generator = np.random.default_rng(1)
    image = generator.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    other = generator.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    for convert in (lambda x: x, lambda x: torch.tensor(x).float() / 255):
        assert first_difference(describe(convert(image)), describe(convert(image + 1))) is None
        assert first_difference(describe(convert(image)), describe(convert(other))) is not None
        assert not are_equal(convert(image), convert(image + 1))


def test_incomparable_objects_count_as_equal() -> None:
    """An object that cannot be compared is described by its type, in bounded space."""
    one, other = threading.Lock(), threading.Lock()
    assert are_equal(one, other)
    assert first_difference(describe((one, 1)), describe((other, 1))) is None
    assert "0x" not in format_description(describe(one))

    class Hostile(UserDict[str, int]):
        def keys(self) -> Any:
            raise OSError("no keys")

        def __iter__(self) -> Any:
            raise OSError("no keys")

    assert describe(Hostile()) == {"type": Hostile.__qualname__}
    nested: list[Any] = []
    nested.append(nested)
    assert are_equal(nested, nested)
    assert len(json.dumps(describe(nested))) < 1000
    wide: Any = 1.5
    for _ in range(8):
        wide = [wide] * 100
    assert len(json.dumps(describe(wide))) < 1e6
    assert len(json.dumps(describe({str(number): number for number in range(10**5)}))) < 1e4


def test_the_order_of_classes_matters() -> None:
    """Classes are found as torchvision names them, also in a subset, and their order counts."""

    class Folder:
        def __init__(self, classes: list[str]) -> None:
            self.classes = classes

    one: Any = Subset(Folder(["cat", "dog"]), [0])  # type: ignore[arg-type]
    assert describe_classes(one) == describe_classes(Folder(["cat", "dog"]))
    assert (
        first_difference(describe_classes(one), describe_classes(Folder(["dog", "cat"])))
        is not None
    )
    assert describe_classes([1, 2]) is None
