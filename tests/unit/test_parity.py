"""The comparison of two runs: what is equal, what is rounding, and what is not finite."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import safetensors.torch
import torch

from launcher.engine.probes.parity import Trace, compare, compare_evaluations, read_trace
from launcher.runs.rundir import RunDir

REFERENCE = Trace(
    samples=[[0, 1], [2, 3]],
    lr=[0.1, 0.05],
    items=[2, 2],
    loss=[1.0, 0.5],
    grad_norm=[3.0, 2.0],
    weights={"first": torch.tensor([1.0, 2.0]), "second": torch.tensor([4.0])},
    evaluations={(2, "dev/loss"): 2.0, (2, "dev/accuracy"): 0.5},
)


def test_rounding_agrees() -> None:
    """Differences up to the tolerance agree, and the largest of each kind is returned."""
    other = replace(REFERENCE, loss=[1.0, 0.5 + 5e-7])
    difference = compare(REFERENCE, other, 1e-5)
    assert difference.agrees
    assert difference.loss == pytest.approx(1e-6)
    assert difference.first_step is None


def test_the_most_different_weight_is_named() -> None:
    """Weights that differ while the steps agree are told from steps that differ, and named."""
    other = replace(REFERENCE, weights=REFERENCE.weights | {"second": torch.tensor([4.1])})
    difference = compare(REFERENCE, other, 1e-5)
    assert (difference.weight, difference.agrees, difference.steps_agree) == ("second", False, True)
    assert compare(REFERENCE, REFERENCE, 1e-5).weight == ""
    assert not compare(REFERENCE, replace(other, loss=[1.0, 0.6]), 1e-5).steps_agree


def test_evaluations_are_compared_by_step_and_name() -> None:
    """The largest difference of a loss is told from that of all metrics; a missing one differs."""

    def difference(**changes: float) -> tuple[float, float] | None:
        values = {(2, f"dev/{name}"): value for name, value in changes.items()}
        return compare_evaluations(REFERENCE, replace(REFERENCE, evaluations=values))

    assert difference(loss=2.0, accuracy=0.5) == (0.0, 0.0)
    assert difference(loss=2.0 + 2e-6, accuracy=0.6) == pytest.approx((1e-6, 0.2))
    assert difference(loss=2.0) == (0.0, math.inf)
    assert difference() == (math.inf, math.inf)
    without = replace(REFERENCE, evaluations={})
    assert compare_evaluations(without, without) is None


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_a_value_that_is_not_finite_differs(value: float) -> None:
    """One loss, gradient norm or weight that is not finite in one run alone is no agreement."""
    for changes in (
        {"loss": [1.0, value]},
        {"grad_norm": [3.0, value]},
        {"weights": REFERENCE.weights | {"second": torch.tensor([value])}},
    ):
        for pair in (
            (REFERENCE, replace(REFERENCE, **changes)),
            (replace(REFERENCE, **changes), REFERENCE),
        ):
            difference = compare(*pair, 1e-5)
            assert not difference.agrees
            assert math.inf in (difference.loss, difference.grad_norm, difference.weights)


def test_imaginary_parts_are_compared() -> None:
    """Weights that are complex numbers differ where their imaginary parts do."""
    one = replace(REFERENCE, weights={"wave": torch.tensor([1 + 2j, 4 + 0j])})
    other = replace(REFERENCE, weights={"wave": torch.tensor([1 + 3j, 4 + 0j])})
    assert compare(one, one, 1e-5).agrees
    assert compare(one, other, 1e-5).weights == pytest.approx(0.25)


def test_runs_that_diverge_alike_agree() -> None:
    """Values that are NaN in both runs do not differ."""
    diverged = replace(
        REFERENCE,
        loss=[1.0, math.nan],
        grad_norm=[3.0, math.nan],
        weights=REFERENCE.weights | {"second": torch.tensor([math.nan])},
    )
    assert compare(diverged, diverged, 0.0).agrees


def test_null_is_read_as_nan(tmp_path: Path) -> None:
    """metrics.jsonl holds null for a loss that is not finite."""
    run_dir = RunDir(tmp_path)
    row = {"step": 1, "lr": 0.1, "items": 2, "loss": None, "grad_norm": None}
    evaluated = {"step": 1, "evaluation": {"loss": None}}
    run_dir.metrics.write_text(f"{json.dumps(row)}\n{json.dumps(evaluated)}\n")
    run_dir.samples(0).parent.mkdir()
    safetensors.torch.save_file({"weight": torch.ones(1)}, run_dir.model)
    trace = read_trace(run_dir)
    assert math.isnan(trace.loss[0])
    assert math.isnan(trace.grad_norm[0])
    assert math.isnan(trace.evaluations[1, "loss"])
