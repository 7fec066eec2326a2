"""Why a recipe's steps would depend on the split: it is tried out on a few samples, in one process.

Five properties are what the promise rests on, and each is tested for what it is rather than looked
up: a sample is the same whenever it is read; the loss of two batches together is the sum of theirs;
in training a sample's outputs do not depend on the others; they draw no random numbers; and forward
changes neither weights nor buffers.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._pytree import tree_leaves

from launcher.engine.data.fingerprint import same
from launcher.engine.data.open_files import moved_files, open_files, opened_since
from launcher.engine.data.randomness import seed_all
from launcher.engine.data.reader import Reader, checked, read_ahead, sample_count
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.model.forward_writes import Writes
from launcher.engine.training.loop import sum_and_count
from launcher.errors import RecipeError
from launcher.recipe.recipe import Recipe
from launcher.runs.job import RecipeSource
from launcher.runs.rundir import RunDir, write_json

_SAMPLES = 8
_ROUNDS = 4
"""How often two workers read each sample."""

_TOLERANCE = 1e-3
"""Relative; far above rounding, far below the effects looked for."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """What was found; each is a reason for steps that depend on the split."""

    changing_samples: list[int]
    """Samples that were another when they were read again."""

    loss_is_mean: bool
    """Whether the loss over two halves has the mean of theirs rather than the sum."""

    loss_is_no_sum: bool
    """Whether it is neither."""

    batch_norms: list[str]
    """Names of BatchNorm modules."""

    coupled: bool
    """Whether in training a sample's loss depends on the others in its micro-batch."""

    dropouts: list[str]
    """Names of modules that drop out."""

    random: bool
    """Whether in training the loss of a batch changes with the seed."""

    num_samples: int
    num_evaluation: int | None
    """Held-out samples; None where there are none."""

    num_trained: int
    """Weights that are trained."""

    without_gradient: list[str]
    """Those that get no gradient from the loss."""

    changed_buffers: list[str]
    """Names of saved buffers that forward changes in training, other than BatchNorm's."""

    changed_weights: list[str]
    """Names of weights that forward writes to in training."""

    batch: str
    """What a batch looks like."""

    outputs_finite: bool
    """Whether the outputs of the untrained model and its loss are."""

    loss_per_item: float
    count: float
    """Items that the loss counted in a batch."""

    items: int
    """And those that the batch has, by the recipe's `count`."""

    shared_file: str | None = None
    """The file whose position all DataLoader workers share, if the data reads through one."""

    differing_in_workers: list[int] = field(default_factory=list)
    """Samples that were others when two workers read at once."""

    metrics: dict[str, str] = field(default_factory=dict)
    """What is wrong with each metric that raised or did not return (sum, count)."""

    empty_metrics: list[str] = field(default_factory=list)
    """Metrics that counted nothing, or whose sum is not finite."""


def inspect_recipe(recipe: Recipe, source: RecipeSource) -> Inspection:
    """Try out the recipe's data, model, loss and metrics on a few samples, on the CPU."""
    seed_all(recipe.seed)
    before = open_files()
    data = recipe.data()
    taken = list(range(min(_SAMPLES, sample_count(data.train, "train"))))
    half = max(len(taken) // 2, 1)
    reader = Reader(recipe, data, source)
    reader.held_files = opened_since(before)
    # Before this process reads: what it opens then, workers that are forked would share.
    in_workers, shared_file = _read_in_workers(recipe, reader, taken)
    seed_all(recipe.seed)  # as every rank does
    again = Reader(recipe, recipe.data())
    changing = [
        index
        for index in reversed(taken)  # another order, as on other ranks
        if not same(_read(reader, [index]), _read(again, [index]))
    ]
    alone = {index: _read(reader, [index]) for index in taken}
    whole, *parts = (_read(reader, part) for part in (taken, taken[:half], taken[half:]))
    seed_all(recipe.seed)
    model = recipe.model()

    writes = _writes(recipe, model, whole)
    remembers = bool(writes.weights() or writes.buffers())

    def loss(batch: Any, seed: int = 0) -> float:
        torch.manual_seed(seed)
        # What one forward writes is not to be taken for randomness in the next.
        subject = _copy(recipe, model) if remembers else model
        return float(sum_and_count(recipe.loss, recipe.forward(subject, batch), batch)[0])

    with torch.no_grad():
        model.eval()
        together, added = loss(whole), sum(map(loss, parts))
        is_sum = _close(together, added) or bool(changing)
        is_mean = not is_sum and _close(together, added / 2)
        model.train()
        coupled = is_sum and not _close(loss(whole), sum(map(loss, parts)))
        random = not _close(loss(whole, seed=1), loss(whole, seed=2))
    outputs = recipe.forward(model, whole)
    total, count = sum_and_count(recipe.loss, outputs, whole)
    total.backward()
    trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
    leaves = [each for each in (*tree_leaves(outputs), total) if isinstance(each, Tensor)]
    evaluation = data.evaluation
    return Inspection(
        changing_samples=sorted(changing),
        loss_is_mean=is_mean,
        loss_is_no_sum=not is_sum and not is_mean,
        batch_norms=_names(model, _BatchNorm),
        coupled=coupled and not random and not changing,
        dropouts=[name for name in _names(model, _DropoutNd) if model.get_submodule(name).p],
        random=random,
        num_samples=sample_count(data.train, "train"),
        num_evaluation=None if evaluation is None else sample_count(evaluation, "evaluation"),
        num_trained=sum(each.numel() for each in trained.values()),
        without_gradient=[name for name, each in trained.items() if each.grad is None],
        changed_buffers=sorted(writes.buffers()),
        changed_weights=sorted(writes.weights()),
        batch=f"a batch is {_describe(whole)}",
        outputs_finite=all(bool(torch.isfinite(each).all()) for each in leaves),
        loss_per_item=float(total) / max(float(count), 1.0),
        count=float(count),
        shared_file=shared_file,
        differing_in_workers=sorted(
            {index for index, batch in in_workers if not same(batch, alone[index])}
        ),
        **_try_metrics(recipe, model, reader),
        items=len(taken) if recipe.count is None else int(recipe.count(whole)),
    )


@torch.no_grad()
def _writes(recipe: Recipe, model: nn.Module, batch: Any) -> Writes:
    """Return what a forward pass in training writes to, of a copy of the model."""
    subject = _copy(recipe, model)
    subject.train()
    writes = Writes(subject)
    recipe.forward(subject, batch)
    return writes


def _copy(recipe: Recipe, model: nn.Module) -> nn.Module:
    """Return a model with the same weights, buffers and mode, which nothing has been done to."""
    try:
        return copy.deepcopy(model)
    except RuntimeError:  # weights that are computed from others, as by torch.nn.utils.weight_norm
        seed_all(recipe.seed)
        return recipe.model().train(model.training)


def _read_in_workers(
    recipe: Recipe, reader: Reader, indices: list[int]
) -> tuple[list[tuple[int, Any]], str | None]:
    """Read each sample several times in two workers at once, if the recipe uses workers.

    Return the samples with their numbers, and the path of a file that the workers share, if any.
    """
    if recipe.in_memory or recipe.num_workers in (0, 1):
        return [], None
    requests = [
        MicroBatchRequest("train", 0, [index], counts=True)
        for _ in range(_ROUNDS)
        for index in indices
    ]
    method = recipe.worker_start
    answers = list(read_ahead(reader, requests, workers=2, method=method, prefetch_factor=4))
    moved = moved_files(reader.held_files) if method == "fork" else []
    if moved:
        return [], moved[0]
    return [(answer.request.indices[0], answer.batch) for answer in map(checked, answers)], None


def _try_metrics(recipe: Recipe, model: nn.Module, reader: Reader) -> dict[str, Any]:
    """Call each metric on evaluation samples; return what is wrong with those that are wrong."""
    wrong: dict[str, str] = {}
    empty: list[str] = []
    if reader.data.evaluation is not None and recipe.metrics:
        count = min(_SAMPLES, sample_count(reader.data.evaluation, "evaluation"))
        batch = _read(reader, list(range(count)), split="evaluation")
        model.eval()
        with torch.no_grad():
            outputs = recipe.forward(model, batch)
            for name, metric in recipe.metrics.items():
                try:
                    total, items = sum_and_count(metric, outputs, batch, name=name)
                except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
                    own = isinstance(error, RecipeError)
                    wrong[name] = str(error) if own else f"{type(error).__name__}: {error}"
                    continue
                if not float(items) or not math.isfinite(float(total)):
                    empty.append(name)
    return {"metrics": wrong, "empty_metrics": empty}


def write_inspection(inspection: Inspection, run_dir: RunDir) -> None:
    """Leave what was found in the run folder."""
    write_json(run_dir.inspection, asdict(inspection))


def read_inspection(run_dir: RunDir) -> Inspection:
    """Return what an inspection left in the run folder."""
    return Inspection(**json.loads(run_dir.inspection.read_text(encoding="utf-8")))


def _describe(batch: Any) -> str:
    shapes = [
        f"{str(each.dtype).removeprefix('torch.')} {tuple(each.shape)}"
        if isinstance(each, Tensor)
        else type(each).__name__
        for each in tree_leaves(batch)
    ]
    return ", ".join(shapes)


def _read(
    reader: Reader, indices: list[int], split: Literal["train", "evaluation"] = "train"
) -> Any:
    return checked(reader[MicroBatchRequest(split, 0, indices, counts=True)]).batch


def _close(one: float, other: float) -> bool:
    return abs(one - other) <= _TOLERANCE * max(abs(one), abs(other), 1e-12)


def _names(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]
