"""What a sample holds, described in plain values and compared."""

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

from launcher.engine.data.fingerprint import classes_of, describe, difference, same, shown

NAN = float("nan")


@dataclass
class Pair:
    """A batch or sample of one's own."""

    x: Any
    y: Any = 0


def values() -> list[Any]:
    """Return values of all kinds, made anew."""
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


NUMBERS = range(len(values()))


@pytest.mark.parametrize("number", NUMBERS)
def test_a_value_agrees_with_itself_and_no_other(number: int) -> None:
    """Made anew or read back from JSON, it has no difference; all others differ from it."""
    value, again = values()[number], values()[number]
    kept = json.loads(json.dumps(describe(value), allow_nan=False))
    assert difference(kept, describe(again)) is None
    assert same(value, again)
    for other in NUMBERS:
        if other != number:
            assert difference(kept, describe(values()[other])) is not None, (number, other)
            assert not same(value, values()[other])


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
    """Nested as it is in the sample; and `same`, which is exact, sees it as well."""
    found = difference(describe(one), describe(other))
    assert found is not None
    assert found.place == place
    assert found.one != found.other, "a message shows what differs"
    assert not same(one, other)


def test_another_decoder_is_no_other_sample() -> None:
    """Images that differ by one in each pixel agree; other images do not; nor do equal ones."""
    drawn = np.random.default_rng(1)
    image = drawn.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    other = drawn.integers(0, 255, (32, 32, 3)).astype(np.uint8)
    for make in (lambda x: x, lambda x: torch.tensor(x).float() / 255):
        assert difference(describe(make(image)), describe(make(image + 1))) is None
        assert difference(describe(make(image)), describe(make(other))) is not None
        assert not same(make(image), make(image + 1))


def test_what_cannot_be_compared_is_the_same() -> None:
    """An object of an unknown type is described by its type alone, without an address."""
    one, other = threading.Lock(), threading.Lock()
    assert same(one, other)
    assert difference(describe((one, 1)), describe((other, 1))) is None
    assert "0x" not in shown(describe(one))

    class Hostile(UserDict[str, int]):
        def keys(self) -> Any:
            raise OSError("no keys")

        def __iter__(self) -> Any:
            raise OSError("no keys")

    assert describe(Hostile()) == {"type": Hostile.__qualname__}
    nested: list[Any] = []
    nested.append(nested)
    assert same(nested, nested)
    assert len(json.dumps(describe(nested))) < 1000
    wide: Any = 1.5
    for _ in range(8):
        wide = [wide] * 100
    assert len(json.dumps(describe(wide))) < 1e6
    assert len(json.dumps(describe({str(number): number for number in range(10**5)}))) < 1e4


def test_classes_keep_their_order() -> None:
    """As torchvision names them, inside of a subset too."""

    class Folder:
        def __init__(self, classes: list[str]) -> None:
            self.classes = classes

    one: Any = Subset(Folder(["cat", "dog"]), [0])  # type: ignore[arg-type]
    assert classes_of(one) == classes_of(Folder(["cat", "dog"]))
    assert difference(classes_of(one), classes_of(Folder(["dog", "cat"]))) is not None
    assert classes_of([1, 2]) is None
