"""Find out whether a recipe's steps would depend on the split, on a few samples in one process.

The promise rests on five properties, each of which is tested by its effect instead of by the type
of modules: a sample is the same whenever it is read; the loss of a batch is the sum of the losses
of its parts; in training the outputs of a sample do not depend on the other samples; they draw no
random numbers; and forward changes neither weights nor buffers.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd

from launcher.engine.backends.nested_tensors import describe_nested, tensors_in
from launcher.engine.backends.parallel_plan import find_styles
from launcher.engine.backends.recipe_forward import call_forward
from launcher.engine.data.fingerprint import are_equal
from launcher.engine.data.object_lists import ObjectList, find_object_lists
from launcher.engine.data.open_files import moved_files, open_files, opened_since
from launcher.engine.data.prefetching import prefetch, raise_if_error
from launcher.engine.data.randomness import seed_all
from launcher.engine.data.reader import Reader
from launcher.engine.data.recipe_data import call_data, sample_count, with_first_samples
from launcher.engine.data.sample_threads import SampleThreads
from launcher.engine.data.sampler import MicroBatchRequest
from launcher.engine.data.streams import ENDLESS, Stream
from launcher.engine.metrics.collected_metrics import build_metric, update_metric
from launcher.engine.model.forward_writes import WriteDetector
from launcher.engine.probes.loss_properties import LossProbe, LossProperties, copy_model
from launcher.engine.state.hyperparameters import make_optimizer
from launcher.engine.state.optimizer_kinds import check_strategy_of
from launcher.engine.state.parameter_kinds import check_parameters
from launcher.engine.training.initial_model import build_model, load_weights
from launcher.engine.training.loss_calls import sum_and_count, training_loss
from launcher.engine.training.objectives import only_trained, trained_names
from launcher.errors import RecipeError
from launcher.json_file import exact_floats, read_json
from launcher.planning.plan import Plan
from launcher.printable import NOTE, error_line, notes_of
from launcher.recipe.evaluation_sets import metric_name, split_of, title_of
from launcher.recipe.prediction_metric import prediction_metrics, sum_metrics
from launcher.recipe.recipe import Data, Recipe
from launcher.runs.files import write_json
from launcher.runs.job import RecipeSource
from launcher.runs.rundir import RunDir

_NUM_SAMPLES = 8
_READS_IN_WORKERS = 4
"""How often two workers read each sample."""


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """The result of an inspection: reasons for steps that depend on the split, and basic facts."""

    changing_samples: list[int]
    """Samples that differ when they are read again."""

    loss_is_mean: bool
    """Whether the loss of a batch is the mean of the losses of its halves instead of the sum."""

    loss_is_not_sum: bool
    """Whether the loss of a batch is neither the sum nor the mean of the losses of its halves."""

    loss_is_not_compared: bool
    """Whether this could not be found out, because the model draws other random numbers for the
    halves, or works in training only."""

    batch_norms: list[str]
    """Names of BatchNorm modules."""

    coupled: bool
    """Whether in training the loss of a sample depends on the others in its micro-batch."""

    dropouts: list[str]
    """Names of active dropout modules."""

    random: bool
    """Whether in training the outputs or the loss of a batch change with the seed."""

    random_in_evaluation: bool
    """Whether they change with the seed in evaluation."""

    num_samples: int
    """Number of training samples; 0 if the data is a stream without `train_samples`."""

    evaluation_samples: dict[str, int]
    """Number of samples of each evaluation set, by name; the name of a single set is empty."""

    num_trained: int
    """Number of trainable weights."""

    without_gradient: list[str]
    """Names of trainable parameters that get no gradient from the loss."""

    changed_buffers: list[str]
    """Names of saved buffers that forward changes in training, other than BatchNorm's."""

    changed_weights: list[str]
    """Names of weights that forward writes to in training."""

    batch: str
    """The structure, dtypes and shapes of a batch, as text."""

    outputs_finite: bool
    """Whether the outputs and the loss of the untrained model are finite."""

    loss_per_item: float
    count: float
    """Number of items that the loss counts in a batch."""

    items: int
    """Number of items that the batch holds, by the recipe's `count`."""

    is_stream: bool = False
    """Whether the training data is a stream."""

    shared_file: str | None = None
    """Path of a file whose position all DataLoader workers share while they read, if any."""

    differing_in_workers: list[int] = field(default_factory=list)
    """Samples that differ when two workers read at the same time."""

    thread_conflict: str | None = None
    """With worker_threads: why several threads of a process must not read the samples."""

    object_lists: list[ObjectList] = field(default_factory=list)
    """Long lists of Python objects in the data, the largest first."""

    evaluation_errors: dict[str, str] = field(default_factory=dict)
    """Errors of forward, loss and metrics that raised on evaluation samples or did not return (sum,
    count), by name, such as `loss` or, of several sets, `dev/loss`."""

    empty_metrics: list[str] = field(default_factory=list)
    """Names of metrics that counted nothing, or whose sum is not finite, on evaluation samples."""


@dataclass(frozen=True, kw_only=True)
class _Samples:
    """A few training samples, read in several ways."""

    reader: Reader
    batch: Any
    """All samples as one batch."""

    halves: list[Any]
    size: int
    num_samples: int
    is_stream: bool
    changing: list[int]
    """Samples that differ when they are read again."""

    differing_in_workers: list[int]
    shared_file: str | None
    thread_conflict: str | None
    object_lists: list[ObjectList]


def inspect_recipe(recipe: Recipe, plan: Plan, source: RecipeSource | None = None) -> Inspection:
    """Inspect the recipe's data, model, loss and metrics with a few samples, on the CPU.

    Args:
        recipe: The recipe.
        plan: The plan of a run of the recipe.
        source: What the recipe is built from; spawned DataLoader workers need it.

    Raises:
        RecipeError: The recipe or its data is at fault, or the strategy cannot train its model
            with its optimizer.
        SampleError: The data set raised an exception.
    """
    samples = _read_samples(recipe, source)
    data, batch = samples.reader.data, samples.batch
    model = build_model(recipe, lambda: batch)
    if recipe.weights is not None:
        load_weights(recipe, recipe.weights, model)
    check_parameters(model, plan)
    if plan.tensor_parallel > 1:
        find_styles(model, recipe.tensor_parallel_plan, plan.tensor_parallel)
    items = samples.size if recipe.count is None else int(recipe.count(batch))
    lrs = [objective.lr for objective in plan.objectives] or [plan.lr]
    losses, written = [], []
    for alone, names, lr in zip(
        recipe.by_objective(), trained_names(recipe, model), lrs, strict=True
    ):
        with only_trained(model, names):
            check_strategy_of(make_optimizer(alone, model, lr), plan.strategy)
            written.append(_find_writes(alone, model, batch))
            has_state = bool(written[-1].weights() or written[-1].buffers())
            losses.append(_inspect_loss(alone, model, samples, has_state=has_state))
    differs = next((loss.count for loss in losses if loss.count != items), losses[0].count)
    trained = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    return Inspection(
        changing_samples=samples.changing,
        loss_is_mean=any(loss.properties.is_mean for loss in losses),
        loss_is_not_sum=any(
            loss.properties.is_sum is False and not loss.properties.is_mean for loss in losses
        ),
        loss_is_not_compared=any(loss.properties.is_sum is None for loss in losses),
        batch_norms=_names_of(model, _BatchNorm),
        coupled=any(loss.properties.is_coupled for loss in losses),
        dropouts=[name for name in _names_of(model, _DropoutNd) if model.get_submodule(name).p],
        random=any(loss.properties.is_random for loss in losses),
        random_in_evaluation=any(loss.properties.is_random_in_evaluation for loss in losses),
        num_samples=samples.num_samples,
        is_stream=samples.is_stream,
        evaluation_samples={
            name: sample_count(each.data, title_of(split_of(name)))
            for name, each in data.evaluation_sets().items()
        },
        num_trained=sum(parameter.numel() for parameter in trained.values()),
        without_gradient=list(
            dict.fromkeys(name for loss in losses for name in loss.without_gradient)
        ),
        changed_buffers=sorted(set().union(*(writes.buffers() for writes in written))),
        changed_weights=sorted(set().union(*(writes.weights() for writes in written))),
        batch=f"a batch is {describe_nested(batch)}",
        outputs_finite=all(loss.is_finite for loss in losses),
        loss_per_item=losses[0].per_item,
        count=differs,
        shared_file=samples.shared_file,
        differing_in_workers=samples.differing_in_workers,
        thread_conflict=samples.thread_conflict,
        object_lists=samples.object_lists,
        **_try_evaluation(recipe, model, samples.reader),
        items=items,
    )


@dataclass(frozen=True, kw_only=True)
class _LossFindings:
    """What was found out about the loss of a recipe, or of one of its objectives."""

    properties: LossProperties
    without_gradient: list[str]
    """Names of the parameters that it trains and that get no gradient from it."""

    is_finite: bool
    """Whether its outputs and itself are finite."""

    per_item: float
    count: float
    """Number of items that it counts in a batch."""


def _inspect_loss(
    recipe: Recipe, model: nn.Module, samples: _Samples, *, has_state: bool
) -> _LossFindings:
    """Inspect one loss, with a forward and a backward pass.

    Args:
        recipe: The recipe with this loss alone.
        model: The model, in which the parameters that the loss trains require a gradient.
        samples: The samples.
        has_state: Whether forward changes the model.

    Raises:
        RecipeError: The loss does not return (sum, count), or the sum has no gradient.
    """
    properties = LossProbe(
        recipe,
        model,
        samples.batch,
        samples.halves,
        num_samples=samples.size,
        has_state=has_state,
    ).inspect(samples_change=bool(samples.changing))
    outputs = recipe.forward(model, samples.batch)
    total, count = training_loss(recipe.loss, outputs, samples.batch)
    total.backward()
    leaves = [leaf for leaf in (*tensors_in(outputs), total) if isinstance(leaf, Tensor)]
    without_gradient = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    model.zero_grad()
    return _LossFindings(
        properties=properties,
        without_gradient=without_gradient,
        is_finite=all(bool(torch.isfinite(leaf.detach()).all()) for leaf in leaves),
        per_item=float(total.detach()) / max(float(count), 1.0),
        count=float(count),
    )


def _read_samples(recipe: Recipe, source: RecipeSource | None) -> _Samples:
    """Read the first training samples in workers, in this process, again, alone and together."""
    seed_all(recipe.seed)
    files_before = open_files()
    data = call_data(recipe)
    object_lists = _find_object_lists(data)
    num_threads = recipe.worker_threads
    recipe = replace(recipe, worker_threads=1)  # what threads read is compared below
    num_samples = sample_count(data.train, "train", recipe.train_samples)
    is_stream = isinstance(data.train, Stream)
    data = with_first_samples(recipe, data, _NUM_SAMPLES)
    indices = list(range(min(_NUM_SAMPLES, sample_count(data.train, "train"))))
    half = max(len(indices) // 2, 1)
    reader = Reader(recipe, data, source)
    reader.held_files = opened_since(files_before)
    # Before this process reads: forked workers would share the files that it opens then.
    in_workers: list[tuple[int, Any]] = []
    shared_file: str | None = None
    if not is_stream:  # which one worker reads
        in_workers, shared_file = _read_in_workers(recipe, reader, indices)
    seed_all(recipe.seed)  # as every rank does
    second_data = with_first_samples(recipe, call_data(recipe), _NUM_SAMPLES)
    second_reader = Reader(recipe, second_data)
    changing = [
        index
        for index in reversed(indices)  # in another order, as on other ranks
        if not are_equal(_read(reader, [index]), _read(second_reader, [index]))
    ]
    singles = {index: _read(reader, [index]) for index in indices}
    parts = [part for part in (indices[:half], indices[half:]) if part]  # one part of one sample
    batch, *halves = (_read(reader, part) for part in (indices, *parts))
    return _Samples(
        reader=reader,
        batch=batch,
        halves=halves,
        size=len(indices),
        num_samples=0 if num_samples == ENDLESS else num_samples,
        is_stream=is_stream,
        changing=sorted(changing),
        differing_in_workers=sorted(
            {index for index, sample in in_workers if not are_equal(sample, singles[index])}
        ),
        shared_file=shared_file,
        thread_conflict=_find_thread_conflict(reader, indices, num_threads, is_stream=is_stream),
        object_lists=object_lists,
    )


def _find_object_lists(data: Data) -> list[ObjectList]:
    sets = {"train": data.train, "lengths": data.lengths} | {
        split_of(name): each.data for name, each in data.evaluation_sets().items()
    }
    found = [each for name, value in sets.items() for each in find_object_lists(name, value)]
    return sorted(found, key=lambda each: -each.growth_bytes)


def _find_thread_conflict(
    reader: Reader, indices: list[int], count: int, *, is_stream: bool
) -> str | None:
    """Return why `count` threads must not read the samples; None if they may, or if count is 1."""
    if count < 2:
        return None
    if is_stream:
        return "the data is a stream, which one thread reads in its order"
    request = MicroBatchRequest("train", 0, indices, has_weight=True, trial=True)
    return reader.thread_conflict(request, SampleThreads(count))


def _read_in_workers(
    recipe: Recipe, reader: Reader, indices: list[int]
) -> tuple[list[tuple[int, Any]], str | None]:
    """Read each sample several times in two workers at once, if the recipe uses workers.

    Returns:
        Pairs of index and sample, and the path of a file that the workers share, if any.
    """
    if recipe.in_memory or recipe.num_workers in (0, 1):
        return [], None
    requests = [
        MicroBatchRequest("train", 0, [index], has_weight=True)
        for _ in range(_READS_IN_WORKERS)
        for index in indices
    ]
    method = recipe.worker_start
    answers = list(prefetch(reader, requests, workers=2, method=method, prefetch_factor=4))
    moved = moved_files(reader.held_files) if method == "fork" else []
    if moved:
        return [], moved[0]
    return [
        (answer.request.indices[0], answer.batch) for answer in map(raise_if_error, answers)
    ], None


@torch.no_grad()
def _find_writes(recipe: Recipe, model: nn.Module, batch: Any) -> WriteDetector:
    """Return what a forward pass in training writes to, observed on a copy of the model."""
    subject = copy_model(recipe, model)
    subject.train()
    writes = WriteDetector(subject)
    call_forward(recipe.forward, subject, batch)
    return writes


@torch.no_grad()
def _try_evaluation(recipe: Recipe, model: nn.Module, reader: Reader) -> dict[str, Any]:
    """Call loss and metrics on samples of each evaluation set.

    Returns:
        The fields of `Inspection` on evaluation.
    """
    errors: dict[str, str] = {}
    empty: list[str] = []
    for set_name, each in reader.data.evaluation_sets().items():
        num_samples = min(_NUM_SAMPLES, sample_count(each.data, title_of(split_of(set_name))))
        batch = _read(reader, list(range(num_samples)), split=split_of(set_name))
        model.eval()
        try:
            outputs = call_forward(recipe.forward, model, batch)
        except Exception as error:  # noqa: BLE001  # whatever the recipe's own code raises
            errors[metric_name(set_name, "forward")] = _error_text(error)
            continue
        for name, metric in prediction_metrics(recipe.metrics).items():
            try:
                update_metric(name, metric, build_metric(name, metric), outputs, batch)
            except Exception as error:  # noqa: BLE001
                errors[metric_name(set_name, name)] = _error_text(error)
        for name, function in {"loss": recipe.loss, **sum_metrics(recipe.metrics)}.items():
            full_name = metric_name(set_name, name)
            try:
                total, count = sum_and_count(function, outputs, batch, name="it")
            except Exception as error:  # noqa: BLE001
                errors[full_name] = _error_text(error)
                continue
            if not float(count) or not math.isfinite(float(total)):
                empty.append(full_name)
    return {"evaluation_errors": errors, "empty_metrics": empty}


def _error_text(error: Exception) -> str:
    text = str(error) if isinstance(error, RecipeError) else error_line(error)
    return "; ".join([text, *(note.removeprefix(NOTE) for note in notes_of(error))])


def write_inspection(inspection: Inspection, run_dir: RunDir) -> None:
    """Write the result of an inspection to the run folder."""
    write_json(run_dir.inspection, exact_floats(asdict(inspection)))


def read_inspection(run_dir: RunDir) -> Inspection:
    """Return the result of the inspection in the run folder.

    Raises:
        RunDirError: The folder holds none, or it is damaged.
    """
    return read_json(run_dir.inspection, Inspection, exact=True)


def _read(reader: Reader, indices: list[int], split: str = "train") -> Any:
    return raise_if_error(reader[MicroBatchRequest(split, 0, indices, has_weight=True)]).batch


def _names_of(model: nn.Module, kind: type[nn.Module]) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, kind)]
