"""Long lists of Python objects in a data set: how they are found, and what they do to a worker."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import small_runs
import torch
from torch import Tensor

from launcher import Data, make_plan, read_machine
from launcher.checks.check import findings_about
from launcher.engine.data.object_lists import find_object_lists
from launcher.engine.data.prefetching import prefetch, raise_if_error
from launcher.engine.data.reader import Reader
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.probes.inspection import inspect_recipe
from launcher.engine.ranks.processes import process_memory, worker_pids

COUNT, PER_SAMPLE = 400_000, 4_000


class Paths:
    """Samples that look at many paths each, kept as Python objects or in one array."""

    def __init__(self, kind: str) -> None:
        paths = [f"/data/train/image_{number:08}.jpeg" for number in range(COUNT)]
        self.paths: Any = np.array(paths, "S") if kind == "array" else paths

    def __len__(self) -> int:
        return COUNT // PER_SAMPLE

    def __getitem__(self, index: int) -> Tensor:
        start = index * PER_SAMPLE
        total = 0
        for path in self.paths[start : start + PER_SAMPLE]:
            total += len(path)
        return torch.full((4,), float(total))


def growth_of_a_worker(kind: str) -> int:
    """Return by how many bytes a forked worker's private memory grows while it reads all paths."""
    data = Paths(kind)
    reader = Reader(small_runs.recipe(), Data(train=data))
    requests = [
        MicroBatchRequest("train", 0, [index], has_weight=True) for index in range(len(data))
    ]
    results = map(raise_if_error, prefetch(reader, requests, workers=1, method="fork"))
    next(results)
    (pid,) = worker_pids()
    sizes = [process_memory(pid).private for _ in results]
    assert process_memory(pid).proportional >= 0
    return sizes[-4] - sizes[0]  # before the worker may have ended


def test_a_forked_worker_copies_python_objects_and_no_arrays() -> None:
    """A worker's private memory grows by about the estimate for a list, and not for an array."""
    (found,) = find_object_lists("train", Paths("list"))
    grown = growth_of_a_worker("list")
    assert found.growth_bytes == pytest.approx(COUNT * 79, rel=0.1)
    assert grown == pytest.approx(found.growth_bytes, rel=0.35)
    assert growth_of_a_worker("array") < 0.1 * grown


class Holder:
    """An object with attributes."""

    def __init__(self, **values: Any) -> None:
        self.__dict__.update(values)


def test_lists_are_found_where_they_are() -> None:
    """Lists, dicts and arrays of objects are found by name, also in what a data set wraps."""
    numbers = range(1_000, 31_000)
    inner = Holder(
        samples=[(f"file {number}", number) for number in numbers],
        classes={f"class {number}": number for number in numbers},
        labels=np.array([f"text {number}" for number in numbers], object),
        ids=np.arange(30_000),
        few=["a"] * 100,
        small=[1] * 30_000,
        tensor=torch.zeros(30_000),
    )
    wrapped: Any = torch.utils.data.Subset(inner, list(numbers))  # type: ignore[arg-type]
    data: Any = torch.utils.data.ConcatDataset([wrapped])
    found = {each.name: each for each in find_object_lists("train", data)}
    place = "train.datasets[0]"
    assert set(found) == {
        f"{place}.indices",
        f"{place}.dataset.samples",
        f"{place}.dataset.classes",
        f"{place}.dataset.labels",
    }
    samples = found[f"{place}.dataset.samples"]
    assert (samples.kind, samples.length, samples.objects) == ("list", 30_000, 90_000)
    assert found[f"{place}.dataset.classes"].objects == 60_000
    assert found[f"{place}.indices"].growth_bytes == 30_000 * 28


def test_columns_of_objects_are_found() -> None:
    """Columns of texts in a table of pandas are found by their names, and numbers are not."""
    pandas = pytest.importorskip("pandas")
    column = pandas.Series([f"text {number}" for number in range(20_000)], dtype=object)
    table = pandas.DataFrame({"text": column, "number": range(20_000)})
    (found,) = find_object_lists("train", Holder(table=table))
    assert (found.name, found.length) == ("train.table['text']", 20_000)


@pytest.mark.parametrize(("kind", "workers", "named"), [("list", 2, True), ("list", 0, False)])
def test_check_names_the_list(
    kind: str, workers: int, named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`check` warns of a long list with its name, count and growth, if there are workers."""
    monkeypatch.setattr("launcher.checks.check._LARGE_GROWTH", 1 << 24)
    recipe = small_runs.recipe(
        data=lambda: Data(train=Paths(kind)),
        loss=lambda outputs, batch: (outputs.square().sum(), len(batch)),
        forward=lambda model, batch: model(batch / 1e6),
        in_memory=False,
        num_workers=workers,
        train_samples=None,
        epochs=None,
        steps=4,
    )
    plan = make_plan(recipe, read_machine(), nproc_per_node=1)
    findings = [
        each
        for each in findings_about(inspect_recipe(recipe, plan), plan)
        if each.check == "host memory"
    ]
    assert bool(findings) is named
    if named:
        for part in ("train.paths", "400,000", "2 workers", "NumPy"):
            assert part in findings[0].found + findings[0].remedy
