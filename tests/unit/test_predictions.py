"""Columns of predictions, their micro-batches, and the files that parts are merged into."""

from __future__ import annotations

import json
import math
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import Tensor

from launcher import Recipe, RecipeError, UsageError, make_plan, read_machine
from launcher.engine.data.sampler import EvaluationSchedule, Sampler
from launcher.engine.training.prediction import _num_rounds, _requests, columns_of
from launcher.recipes.digits import digits
from launcher.runs.prediction_files import Format, Prediction, PredictionPart, format_of, merge


class Pair(NamedTuple):
    """Outputs as a named tuple."""

    logits: Tensor
    state: None


@dataclass
class Output:
    """Outputs as a class of the recipe."""

    scores: Tensor
    loss: Tensor


def test_outputs_of_forward_become_columns() -> None:
    """Tensors with a row for each sample are columns, by their keys, fields or places."""
    rows, scalar = torch.ones(4, 2), torch.tensor(1.0)
    for outputs, names in (
        (rows, ["output"]),
        ({"logits": rows, "loss": scalar}, ["logits"]),
        ((rows, rows[:, 0], rows[:3]), ["output0", "output1"]),
        (Pair(rows, None), ["logits"]),
        (Output(rows, scalar), ["scores"]),
    ):
        columns = columns_of(outputs, 4, is_chosen=False)
        assert list(columns) == names
        assert all(isinstance(column, np.ndarray) for column in columns.values())
    with pytest.raises(RecipeError, match=r"predict=") as caught:
        columns_of({"logits": rows}, 3, is_chosen=False)
    assert "(4, 2)" in str(caught.value)


def test_chosen_columns_are_tensors_arrays_and_lists() -> None:
    """What `predict` returns is taken as it is; only bfloat16 and tensors in lists change."""
    columns = columns_of(
        {
            "half": torch.ones(2, dtype=torch.bfloat16),
            "array": np.zeros((2, 3)),
            "ragged": [torch.ones(1), torch.ones(2)],
            "text": ("a", "b"),
        },
        2,
        is_chosen=True,
    )
    assert columns["half"].dtype == np.float32
    assert columns["array"].shape == (2, 3)
    assert columns["ragged"] == [[1.0], [1.0, 1.0]]
    assert columns["text"] == ["a", "b"]


@pytest.mark.parametrize(
    ("outputs", "named"),
    [
        (torch.ones(2), "dict"),
        ({}, "dict"),
        ({"label": torch.ones(3)}, "label"),
        ({"label": [1]}, "label"),
        ({"label": torch.tensor(1)}, "label"),
        ({"label": 1}, "label"),
        ({"label": "ab"}, "label"),
        ({1: [1, 2]}, "1"),
    ],
)
def test_what_is_no_column_is_refused(outputs: Any, named: str) -> None:
    """Columns have names and a value for each sample; the error names the column."""
    with pytest.raises(RecipeError, match="predict") as caught:
        columns_of(outputs, 2, is_chosen=True)
    assert named in str(caught.value)


@pytest.mark.parametrize("samples", [1, 7, 8, 50])
def test_micro_batches_do_not_depend_on_the_ranks(samples: int) -> None:
    """The ranks together read the same micro-batches as one, each once, and take as many rounds."""
    recipe = replace(digits(), micro_batch_size=4)

    def read(ranks: int) -> list[list[int]]:
        plan = make_plan(recipe, replace(read_machine(), num_gpus=0), nproc_per_node=ranks)
        requests = []
        for rank in range(ranks):
            evaluations = (EvaluationSchedule(samples=samples),)
            sampler = Sampler(plan=plan, rank=rank, train_samples=1, evaluations=evaluations)
            of_rank = list(_requests(sampler))
            assert len(of_rank) == _num_rounds(sampler)
            requests += [request.indices for request in of_rank if request.has_weight]
        return sorted(requests)

    alone = read(1)
    assert [index for indices in alone for index in indices] == list(range(samples))
    assert read(2) == read(3) == alone


def write(folder: Path, kind: Format, ranks: int, batches: list[dict[str, Any]]) -> Path:
    """Write batches in turns by some ranks; return the merged file."""
    folder = folder / f"{kind}{ranks}"
    folder.mkdir()
    prediction = Prediction(input="evaluation", is_file=False, parts=folder, format=kind)
    start = 0
    with ExitStack() as stack:
        parts = [
            stack.enter_context(closing(PredictionPart(prediction, rank))) for rank in range(ranks)
        ]
        for number, batch in enumerate(batches):
            count = len(next(iter(batch.values())))
            parts[number % ranks].add(start, count, batch)
            start += count
    merged = merge(prediction, ranks, folder / "merged")
    assert merged.num_samples == start
    assert merged.columns == tuple(batches[0])
    return folder / "merged"


SCORES = ([1.5, math.nan], [2.5], [math.inf, 0.0])
WORDS: tuple[list[Any], ...] = ([["a"], []], [["é", "b"]], [[], None])
BATCHES: list[dict[str, Any]] = [
    {
        "score": np.array(scores, dtype=np.float32),
        "words": words,
        "grid": np.ones((len(words), 2, 1)),
    }
    for scores, words in zip(SCORES, WORDS, strict=True)
]


def test_json_lines_are_merged_in_order(tmp_path: Path) -> None:
    """The bytes are the same whoever wrote which batch; NaN and infinity are null."""
    contents = [write(tmp_path, "jsonl", ranks, BATCHES).read_bytes() for ranks in (1, 2, 3, 5)]
    assert len(set(contents)) == 1
    rows = [json.loads(line) for line in contents[0].splitlines()]
    assert [row["score"] for row in rows] == [1.5, None, 2.5, None, 0.0]
    assert [row["words"] for row in rows] == [["a"], [], ["é", "b"], [], None]
    assert rows[0]["grid"] == [[1.0], [1.0]]


def test_parquet_is_merged_in_order(tmp_path: Path) -> None:
    """The bytes are the same whoever wrote which batch, also if one has only empty values."""
    parquet = pytest.importorskip("pyarrow.parquet")
    contents = [write(tmp_path, "parquet", ranks, BATCHES).read_bytes() for ranks in (1, 2, 3, 5)]
    assert len(set(contents)) == 1
    table = parquet.read_table(tmp_path / "parquet1/merged")
    rows = table.to_pylist()
    assert [row["score"] for row in rows][2:] == [2.5, math.inf, 0.0]
    assert math.isnan(rows[1]["score"])
    assert [row["words"] for row in rows] == [["a"], [], ["é", "b"], [], None]
    assert rows[0]["grid"] == [[1.0], [1.0]]


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_values_of_other_kinds_are_refused(tmp_path: Path, kind: Format) -> None:
    """Objects, other columns, and values of several types end in an error that says so."""
    if kind == "parquet":
        pytest.importorskip("pyarrow")
    with pytest.raises(RecipeError, match="cannot be written"):
        write(tmp_path, kind, 1, [{"x": [object()]}])
    with pytest.raises(RecipeError, match="'y'"):
        write(tmp_path, kind, 2, [{"x": [1]}, {"y": [1]}])
    with pytest.raises(RecipeError, match="'y'"):
        write(tmp_path, kind, 3, [{"x": [1]}, {"x": [1]}, {"x": [1]}, {"y": [1]}])


def test_the_suffix_is_the_format() -> None:
    """The end of the name chooses the format; others are refused."""
    assert format_of(Path("a.jsonl")) == format_of(Path("b.NDJSON")) == "jsonl"
    for name in ("a", "a.csv", "a.jsonl.gz"):
        with pytest.raises(UsageError, match=r"\.parquet"):
            format_of(Path(name))


@pytest.mark.parametrize("field", ["predict", "predict_data"])
def test_functions_of_predictions_are_checked(field: str) -> None:
    """A recipe whose function takes other arguments is refused by the name of the field."""

    def changed(value: Any) -> Recipe:
        changes: dict[str, Any] = {field: value}
        return replace(digits(), **changes)

    for value in (lambda: None, "text"):
        with pytest.raises(RecipeError, match=field):
            changed(value)
    assert getattr(changed(None), field) is None
