"""Metrics over all predictions in one process: their values, and what is refused."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support import ROOT, read_lines
from torch import Tensor
from torchmetrics.classification import MulticlassAUROC, MulticlassConfusionMatrix

from launcher import (
    Recipe,
    RecipeError,
    TrainingError,
    all_predictions,
    make_plan,
    read_machine,
)
from launcher.engine.backends.local import LocalBackend
from launcher.engine.metrics.collected_metrics import build_metric
from launcher.engine.metrics.metric_states import find_states
from launcher.engine.probes.inspection import inspect_recipe
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir
from launcher.signals import StopRequest

sys.path.insert(0, str(ROOT / "tests" / "recipes"))

import judged
from judged import Plain, first_class


def plan_of(recipe: Recipe) -> Plan:
    """Return the plan of a run in this process."""
    return make_plan(replace(recipe, device="cpu"), read_machine(), nproc_per_node=1)


def train(recipe: Recipe, folder: Path) -> dict[str, Any]:
    """Train in this process; return the last evaluation."""
    recipe = replace(recipe, device="cpu", strategy="ddp")
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    backend = LocalBackend(recipe, plan_of(recipe))
    train_rank(recipe, backend.plan, backend, RunDir(folder), output, stop=StopRequest())
    rows = [row for row in read_lines(folder / "metrics.jsonl") if "evaluation" in row]
    values: dict[str, Any] = rows[-1]["evaluation"]
    return values


def with_metric(metric: Any) -> Recipe:
    """Return the recipe with one metric."""
    return replace(judged.judged(), metrics={"odd": metric})


def test_the_values_are_those_of_the_library(tmp_path: Path) -> None:
    """AUROC and a collection equal what torchmetrics computes from all predictions at once."""
    kept: dict[int, list[tuple[Tensor, Tensor]]] = {}

    class Keeping(Plain):
        def update(self, predictions: Tensor, targets: Tensor) -> None:
            kept.setdefault(self.number, []).append((predictions, targets))

        def reset(self) -> None:
            super().reset()
            self.number = getattr(self, "number", 0) + 1

    base = judged.judged()
    recipe = replace(
        base, metrics={**base.metrics, "kept": all_predictions(Keeping)}, micro_batch_size=2
    )
    values = train(recipe, tmp_path)
    sets = [
        tuple(torch.cat(each) for each in zip(*batches, strict=True)) for batches in kept.values()
    ]
    dev = next(each for each in reversed(sets) if len(each[0]) == 23)
    assert values["dev/auroc"] == pytest.approx(float(MulticlassAUROC(judged.CLASSES)(*dev)))
    expected = judged.build_several()(*dev)
    assert {name: values[f"dev/several/{name}"] for name in expected} == pytest.approx(
        {name: float(value) for name, value in expected.items()}
    )


class Failing(Plain):
    """A metric that raises in one of its methods, from its second evaluation batch on."""

    where = ""
    result: Any = None

    def update(self, predictions: Tensor, targets: Tensor) -> None:
        """Take samples, or raise."""
        super().update(predictions, targets)
        if self.where == "update" and self.count > 4:
            raise ValueError("no more")

    def compute(self) -> Any:
        """Return a result that is no number, or raise."""
        if self.where == "compute":
            raise KeyError("a key")
        return self.result


def failing(where: str = "", result: Any = None) -> Callable[[], Any]:
    """Return a function that builds a metric that raises, or computes a result."""

    def build() -> Failing:
        metric = Failing()
        metric.where, metric.result = where, result
        return metric

    return build


@pytest.mark.parametrize(
    ("where", "fragments"),
    [
        ("update", ("The metric odd raised ValueError", "no more", "in update")),
        ("compute", ("The metric odd raised KeyError", "'a key'", "in compute")),
    ],
)
def test_a_metric_that_raises_is_named(
    tmp_path: Path, where: str, fragments: tuple[str, ...]
) -> None:
    """The error names the metric, the evaluation set, the step and the rank."""
    recipe = with_metric(all_predictions(failing(where), first_class))
    with pytest.raises(TrainingError) as caught:
        train(replace(recipe, micro_batch_size=3), tmp_path)
    text = str(caught.value)
    for fragment in (*fragments, "the dev evaluation after step 3, on rank 0"):
        assert fragment in text
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-00000003"]


def test_a_function_that_raises_is_named(tmp_path: Path) -> None:
    """A metric that is a function is named in the same way."""

    def odd(logits: Tensor, batch: Any) -> tuple[Tensor, int]:
        return logits[5].sum(), len(batch[1])

    with pytest.raises(TrainingError, match="The metric odd raised IndexError in the dev eval"):
        train(replace(with_metric(odd), micro_batch_size=3), tmp_path)


@pytest.mark.parametrize(
    "result",
    [None, "0.5", torch.zeros(3), {"a": None}, {}, [0.5], torch.tensor(1j)],
    ids=["none", "text", "vector", "nothing", "empty", "list", "complex"],
)
def test_a_result_that_is_no_number_is_refused(tmp_path: Path, result: Any) -> None:
    """A result without a number is an error that names the metric."""
    recipe = with_metric(all_predictions(failing(result=result), first_class))
    with pytest.raises(TrainingError, match=r"odd computed .*, which is no number"):
        train(recipe, tmp_path)


@pytest.mark.parametrize(
    ("result", "values"),
    [
        (True, {"odd": 1.0}),
        (torch.tensor([[0.25]]), {"odd": 0.25}),
        ({"a": {"b": 1, "c": torch.ones(2)}, 3: 0.5}, {"odd/a/b": 1.0, "odd/3": 0.5}),
    ],
)
def test_results_become_numbers(tmp_path: Path, result: Any, values: dict[str, float]) -> None:
    """Numbers, tensors of one element and nested dicts of these become named numbers."""
    recipe = with_metric(all_predictions(failing(result=result), first_class))
    found = train(recipe, tmp_path)
    names = {f"dev/{name}": value for name, value in values.items()}
    assert {name: found[name] for name in found if name.startswith("dev/odd")} == names


def missing() -> Any:
    """Import a package that is not installed."""
    import no_such_package_of_metrics  # type: ignore[import-not-found]

    return no_such_package_of_metrics


@pytest.mark.parametrize(
    ("metric", "fragment"),
    [
        (all_predictions(Plain, lambda logits, _: logits), "as a tuple"),
        (all_predictions(missing), "no_such_package_of_metrics"),
        (all_predictions(dict), "update, compute and reset, found a dict"),
        (all_predictions(lambda: Plain), "update, compute and reset, found a type"),
    ],
    ids=["arguments", "missing", "dict", "class"],
)
def test_a_mistake_is_found_before_the_first_step(
    tmp_path: Path, metric: Any, fragment: str
) -> None:
    """What cannot be built or updated is refused before the first step."""
    with pytest.raises(RecipeError, match=fragment):
        train(with_metric(metric), tmp_path)
    assert not (tmp_path / "checkpoints").exists()


@pytest.mark.parametrize(
    "make",
    [
        lambda: with_metric(MulticlassAUROC(3)),
        lambda: with_metric(MulticlassAUROC),
        lambda: all_predictions(MulticlassAUROC(3)),
        lambda: all_predictions("auroc"),  # type: ignore[arg-type]
        lambda: all_predictions(first_class),  # type: ignore[arg-type]
        lambda: all_predictions(Plain, Plain),  # type: ignore[arg-type]
    ],
)
def test_another_form_is_refused(make: Callable[[], Any]) -> None:
    """An object or class of a metric, and functions of other arguments, are refused at once."""
    with pytest.raises(RecipeError, match="all_predictions"):
        make()


def test_a_batch_without_a_second_element_is_described() -> None:
    """With a batch that is a dict, the error says what to write."""
    arguments = all_predictions(Plain).arguments
    assert arguments("outputs", ["inputs", "targets", "more"]) == ("outputs", "targets")
    with pytest.raises(RecipeError, match=r"lambda outputs, batch: \(outputs, batch\['labels'"):
        arguments("outputs", {"labels": 1})


def test_check_tries_the_metrics() -> None:
    """`launcher check` updates each metric with a few samples of each set."""
    recipe = with_metric(all_predictions(failing("update"), first_class))
    inspection = inspect_recipe(replace(recipe, device="cpu"), plan_of(recipe))
    assert inspection.evaluation_samples == {"dev": 23, "test": 7}
    assert list(inspection.evaluation_errors) == ["dev/odd", "test/odd"]
    assert "no more" in inspection.evaluation_errors["dev/odd"]


def test_states_are_combined_where_that_is_exact() -> None:
    """States with sums, extremes and lists are combined; updates of other metrics are gathered."""
    combined = [
        judged.build_auroc(),
        judged.build_several(),
        judged.build_highest(),
        judged.build_listed(),
        MulticlassConfusionMatrix(3),
    ]
    gathered = [judged.build_pearson(), Plain()]
    assert [find_states(each) is None for each in combined] == [False] * 5
    assert [find_states(each) is None for each in gathered] == [True, True]


def test_a_collection_does_not_guess_its_groups() -> None:
    """Metrics whose states are equal after the first batch keep states of their own."""
    built = build_metric("several", all_predictions(judged.build_several))
    logits = torch.tensor([[9.0, 1, 0, 0], [9, 1, 0, 0]])
    built.update(logits, torch.tensor([0, 0]))  # right for every k
    built.update(logits, torch.tensor([1, 1]))
    assert {name: float(value) for name, value in built.compute().items() if "top" in name} == {
        "top1": 0.5,
        "top3": 1.0,
    }
