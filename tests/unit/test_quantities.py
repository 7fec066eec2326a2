"""Quantities as text."""

from __future__ import annotations

import math

import pytest

from launcher.quantities import measured


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.0, "0.0000"),
        (2.3026, "2.3026"),
        (-0.0123, "-0.0123"),
        (143.572, "143.5720"),
        (0.00031, "0.00031"),
        (3.5123e-05, "3.512e-05"),
        (1.798060568234913e36, "1.798e+36"),
        (math.nan, "nan"),
        (-math.inf, "-inf"),
    ],
)
def test_a_measured_number_shows_its_first_digits(value: float, text: str) -> None:
    """A small number is not shown as 0, nor a large one with digits that nobody reads."""
    assert measured(value) == text
