"""Start the ranks that predict with the weights of a run, and merge what they write."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launcher.errors import RunDirError, UsageError
from launcher.launch.evaluate_run import PreparedWeights, WeightsRequest, computed, prepare_weights
from launcher.launch.signal_handler import SignalHandler
from launcher.paths import exists
from launcher.printable import printable_line
from launcher.runs.files import unwritable_error
from launcher.runs.prediction_files import Merged, Prediction, format_of, merge
from launcher.runs.private_folder import private_folder

DATA_SETS = ("evaluation", "train")
"""The names of the data sets that every recipe has."""


@dataclass(frozen=True, kw_only=True)
class PredictRequest(WeightsRequest):
    """A request to predict with the weights of a run."""

    input: str
    """A file that the recipe's `predict_data` reads, or the name of a data set."""

    out: Path
    """The file to write."""

    force: bool = False
    """Whether `out` may replace a file."""


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """A file of predictions, a row for each sample in the order of the data."""

    path: Path
    """The file."""

    num_samples: int
    """Number of samples."""

    columns: tuple[str, ...]
    """Names of the columns."""

    weights: str
    """What holds the weights: `model.safetensors`, or the name of a checkpoint."""

    step: int
    """Optimizer steps that the weights were trained for."""

    def to_dict(self) -> dict[str, Any]:
        """Return the values for JSON."""
        return {**asdict(self), "path": str(self.path)}


def predict_run(request: PredictRequest, signals: SignalHandler) -> Predictions:
    """Predict each sample of the input once, and write a file completely or not at all.

    Raises:
        RunFailedError: A rank failed.
        UsageError: The run has no such weights, there is no such input, or the file exists.
    """
    from launcher.engine.worker import agent_prediction

    out = request.out.absolute()
    file_format = format_of(out)
    _check_out(out, force=request.force)
    prepared = prepare_weights(request)
    is_file = _is_file(request.input, prepared)
    with _parts_beside(out) as folder:
        prediction = Prediction(
            input=str(Path(request.input).absolute()) if is_file else request.input,
            is_file=is_file,
            parts=folder,
            format=file_format,
        )
        with computed(prepared, agent_prediction, signals, prediction=prediction):
            merged = _write(prediction, prepared.plan.world_size, out)
    return Predictions(
        path=out,
        num_samples=merged.num_samples,
        columns=merged.columns,
        weights=prepared.weights.name,
        step=prepared.weights.step,
    )


def _check_out(out: Path, *, force: bool) -> None:
    """Refuse an output that exists, or that no file can replace.

    Raises:
        RunDirError: It does.
    """
    if out.is_dir():
        raise RunDirError(f"--out {out} is a folder. Give the path of a file.")
    if os.path.lexists(out) and not force:
        raise RunDirError(f"{out} exists. Give another --out, or add --force to replace it.")


def _is_file(text: str, prepared: PreparedWeights) -> bool:
    """Return whether the input is a file, rather than the name of a data set.

    Raises:
        UsageError: There is no such file, or the recipe reads none.
    """
    if text in DATA_SETS:
        return False
    recipe, shown = prepared.built.recipe, printable_line(text)
    names = " and ".join(DATA_SETS)
    if exists(Path(text)):
        if recipe.predict_data is None:
            raise UsageError(
                f"{shown} is a file, and the recipe {recipe.name} has no function that reads it. "
                "Give Recipe(predict_data=...) a function (path) that returns a data set, or name "
                f"one that the recipe has, such as {names}."
            )
        return True
    if Path(text).name != text or Path(text).suffix:
        raise UsageError(
            f"{shown} does not exist. Give a file, or the name of a data set of the recipe, such "
            f"as {names}."
        )
    return False


@contextlib.contextmanager
def _parts_beside(out: Path) -> Iterator[Path]:
    """Make a folder beside a file, on the same disk, for the duration of the context.

    Raises:
        RunDirError: It cannot be made.
    """
    with contextlib.ExitStack() as stack:
        try:
            folder = stack.enter_context(private_folder(out.parent))
        except OSError as error:
            raise unwritable_error(out, error) from None
        yield folder


def _write(prediction: Prediction, ranks: int, out: Path) -> Merged:
    """Merge the parts, and give the file its name.

    Raises:
        RunDirError: The file cannot be written.
    """
    merged = prediction.parts / "merged"
    try:
        result = merge(prediction, ranks, merged)
        with merged.open("rb") as file:
            os.fsync(file.fileno())
        merged.replace(out)
    except OSError as error:
        raise unwritable_error(out, error) from None
    return result
