"""Predict with the weights of a run: what `launcher predict` does on each rank."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launcher.engine.backends.base import Backend
from launcher.engine.backends.nested_tensors import describe_nested
from launcher.engine.data.randomness import seed_evaluation
from launcher.engine.data.recipe_data import call_data, sample_count
from launcher.engine.data.sampler import MicroBatchRequest, Sampler
from launcher.engine.training.finished_run import build_with_weights
from launcher.errors import RecipeError
from launcher.planning.global_batch import ceil_div
from launcher.planning.plan import Plan
from launcher.printable import printable_line
from launcher.recipe.evaluation_sets import Evaluation
from launcher.recipe.recipe import Data, Recipe
from launcher.runs.job import RecipeSource
from launcher.runs.prediction_files import Prediction, PredictionPart
from launcher.runs.weight_choice import WeightChoice


def predict_samples(
    recipe: Recipe,
    plan: Plan,
    backend: Backend,
    weights: WeightChoice,
    prediction: Prediction,
    *,
    source: RecipeSource,
    report_phase: Callable[[int, str], None],
) -> None:
    """Predict each sample of the input once, and write this rank's part (collective).

    The samples are divided into micro-batches that do not depend on the number of ranks.

    Args:
        recipe: The recipe of the run.
        plan: The plan of the ranks.
        backend: This rank among the others.
        weights: The weights of the run.
        prediction: What is predicted.
        source: What the recipe is built from; spawned DataLoader workers need it.
        report_phase: Called with (steps taken, phase) whenever this rank enters a phase.

    Raises:
        RecipeError: There is no such input, or the recipe's predictions are no columns.
        CheckpointError: The weights are damaged, or belong to another model.
    """
    context = build_with_weights(
        with_input(recipe, prediction),
        plan,
        backend,
        weights,
        source=_InputSource(
            recipe=source.recipe, overrides=source.overrides, prediction=prediction
        ),
        report_phase=report_phase,
        read=_requests,
    )
    model, function = context.model, recipe.predict or recipe.forward
    context.batch_norms.average(backend)
    model.eval()
    with (
        torch.no_grad(),
        context.evaluated_weights(),
        contextlib.closing(PredictionPart(prediction, backend.rank)) as part,
    ):
        for _ in range(_num_rounds(context.sampler)):
            report_phase(weights.step, "evaluating")
            micro_batch = next(context.micro_batches)
            batch, request = backend.to_device(micro_batch.batch), micro_batch.request
            seed_evaluation(backend, request)
            with backend.autocast():
                outputs = backend.forward(function, model, batch)
            if request.has_weight and backend.leads_group:
                count = len(request.indices)
                columns = columns_of(outputs, count, is_chosen=recipe.predict is not None)
                part.add(request.indices[0], count, columns)


@dataclass(frozen=True, kw_only=True)
class _InputSource(RecipeSource):
    """Builds the recipe with the input as its evaluation data, in a DataLoader worker."""

    prediction: Prediction

    def build(self) -> Recipe:
        return with_input(super().build(), self.prediction)


def with_input(recipe: Recipe, prediction: Prediction) -> Recipe:
    """Return the recipe with the input of a prediction as its evaluation data."""

    def read() -> Data:
        if prediction.is_file:
            return _read_file(recipe, Path(prediction.input))
        data = call_data(recipe)
        return replace(data, evaluation=_named_set(data, prediction.input))

    return replace(recipe, data=read, count=None)


def _read_file(recipe: Recipe, path: Path) -> Data:
    """Return the data set that the recipe reads from a file, with the function that collates it.

    Raises:
        RecipeError: The recipe returns something else.
    """
    assert recipe.predict_data is not None
    dataset, collate = recipe.predict_data(path), None
    if isinstance(dataset, tuple) and len(dataset) == 2 and callable(dataset[1]):
        dataset, collate = dataset
    sample_count(dataset, "prediction")
    return Data(train=dataset, evaluation=dataset, collate=collate)


def _named_set(data: Data, name: str) -> Evaluation:
    """Return the data set of a recipe that is called `name`.

    Raises:
        RecipeError: There is none.
    """
    sets = {key or "evaluation": each for key, each in data.evaluation_sets().items()}
    sets["train"] = Evaluation(data.train)
    if name not in sets:
        raise RecipeError(
            f"{printable_line(name)} is neither a file nor a data set of the recipe: there are "
            f"{' and '.join(map(printable_line, sets))}."
        )
    return sets[name]


def _requests(sampler: Sampler) -> Iterator[MicroBatchRequest]:
    """Yield the requests of a rank for each sample once, the same number on every rank."""
    size, total = sampler.plan.micro_batch_size, sampler.evaluations[0].samples
    for number in range(_num_rounds(sampler)):
        start = (number * sampler.plan.data_ranks + sampler.rank) * size
        indices = list(range(start, min(start + size, total)))
        yield MicroBatchRequest("evaluation", 0, indices or [0], has_weight=bool(indices))


def _num_rounds(sampler: Sampler) -> int:
    num_micro_batches = ceil_div(sampler.evaluations[0].samples, sampler.plan.micro_batch_size)
    return ceil_div(num_micro_batches, sampler.plan.data_ranks)


def columns_of(outputs: Any, count: int, *, is_chosen: bool) -> dict[str, Any]:
    """Return outputs as columns: lists and NumPy arrays with a value for each sample, by name.

    Args:
        outputs: What `Recipe.predict` returned or, without it, `Recipe.forward`.
        count: The number of samples.
        is_chosen: Whether they are of `Recipe.predict`. Outputs of forward that have no row for
            each sample are left out.

    Raises:
        RecipeError: They are no columns, or a column has another number of values.
    """
    if not is_chosen:
        columns = {
            name: _values(value)
            for name, value in _named_outputs(outputs).items()
            if isinstance(value, Tensor) and value.ndim and len(value) == count
        }
        if not columns:
            raise RecipeError(
                f"forward returned {describe_nested(outputs)} for {count:,} samples, in which no "
                "tensor has a row for each sample. Give Recipe(predict=...) a function (model, "
                "batch) that returns a dict of columns."
            )
        return columns
    if not isinstance(outputs, Mapping) or not outputs:
        raise RecipeError(
            f"Recipe(predict=...): expected a dict of columns by name, with a value for each of "
            f"{count:,} samples, found {describe_nested(outputs)}."
        )
    columns = {}
    for name, value in outputs.items():
        column = _values(value)
        if not isinstance(name, str) or not hasattr(column, "__len__") or isinstance(column, str):
            raise RecipeError(
                f"Recipe(predict=...): expected columns by name, each a tensor, an array or a list "
                f"with a value for each of {count:,} samples, found {name!r}: "
                f"{describe_nested(value)}."
            )
        if getattr(column, "shape", None) == () or len(column) != count:
            raise RecipeError(
                f"Recipe(predict=...): the column {printable_line(name)} is "
                f"{describe_nested(value)} for {count:,} samples. Return a value for each sample."
            )
        columns[name] = column
    return columns


def _named_outputs(outputs: Any) -> dict[str, Any]:
    """Return the outputs of forward by name: `output`, the keys or fields, or output0, output1."""
    if isinstance(outputs, Tensor):
        return {"output": outputs}
    if isinstance(outputs, Mapping):
        return {str(name): value for name, value in outputs.items()}
    if dataclasses.is_dataclass(outputs):
        names = [field.name for field in dataclasses.fields(outputs)]
        return {name: getattr(outputs, name) for name in names}
    if isinstance(outputs, (list, tuple)):
        names = getattr(outputs, "_fields", [f"output{index}" for index in range(len(outputs))])
        return dict(zip(names, outputs, strict=True))
    return {}


def _values(value: Any) -> Any:
    """Return a column without tensors: an array, or a list of plain values."""
    if isinstance(value, Tensor):
        value = value.detach()
        value = value.float() if value.dtype in (torch.bfloat16, torch.float16) else value
        return (value if value.layout is torch.strided else value.to_dense()).cpu().numpy()
    if isinstance(value, (list, tuple)):
        return [item.tolist() if hasattr(item, "tolist") else item for item in value]
    return value
