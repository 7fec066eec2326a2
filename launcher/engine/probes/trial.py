"""Check a few samples before the first step, and refuse a run that would be wrong.

The DataLoader workers read these samples like all others, before anything else. The samples show
whether every rank has the same data, and the same data as before a resume; whether the loss is a
sum over its items; and whether the metrics work.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import nn

from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.open_files import moved_files
from launcher.engine.data.randomness import Generators
from launcher.engine.model.forward_writes import TensorVersion, read_version
from launcher.engine.probes.data_identity import (
    CheckpointData,
    check_repeatable,
    compare_checkpoint,
    compare_ranks,
    compare_schedules,
    describe_data,
    fingerprint_of,
    stream_notes,
)
from launcher.engine.probes.worker_queues import check_worker_queues
from launcher.engine.ranks.failures import is_out_of_memory
from launcher.engine.state.compiled import is_compiled
from launcher.engine.training.context import TrainContext
from launcher.engine.training.loss_calls import LOSS, sum_and_count
from launcher.environment.machine import shm_bytes
from launcher.errors import LauncherError, RecipeError
from launcher.printable import class_name, notes_of, text_of
from launcher.recipe.evaluation_sets import title_of
from launcher.recipe.prediction_metric import prediction_metrics, sum_metrics
from launcher.recipe.recipe import Recipe

T = TypeVar("T")

_TOLERANCES = {"fp64": 1e-2, "fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
"""Relative tolerances; the mean of two halves and their sum differ by a factor of two."""

_SEED_TOLERANCE = 1e-4
"""Relative change of a loss with the seed below which the model draws no random numbers."""


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """The result of a trial."""

    fingerprint: dict[str, Any] | None = None
    """Lengths, classes and a few samples of the data, as JSON values; None if no trial was run."""

    warnings: tuple[str, ...] = ()
    """Warnings for the user, equal on every rank."""


def run_trial(
    context: TrainContext,
    recipe: Recipe,
    *,
    step: int = 0,
    checkpoint_data: CheckpointData | None = None,
) -> TrialOutcome:
    """Check the samples in the first micro-batches of `context` (collective).

    Modes, buffers and random generators are restored afterwards.

    Args:
        context: Its next micro-batches must be those of `Sampler.trial`.
        recipe: What is trained. Its `forward` is called instead of the one in `context`, which may
            count calls.
        step: Number of steps that were taken before.
        checkpoint_data: The data of the run that is resumed; None for a new run.

    Raises:
        RecipeError: Ranks have different data, samples change between reads, workers share a file,
            the loss is a mean, or a metric does not return (sum, count).
        CheckpointError: The data is not that of the run that is resumed.
        SampleError: The data set raised an exception.
    """
    backend = context.backend
    compare_ranks(describe_data(context), backend)
    compare_schedules(context)
    context.report_phase(step, "reading data")  # starts the watch for a hang
    micro_batches = _read_micro_batches(context)
    context.report_phase(step, "computing")
    fingerprint, changed = fingerprint_of(context, micro_batches)
    warnings = (*stream_notes(context), *check_repeatable(context, changed))
    compare_ranks(fingerprint, backend)
    if checkpoint_data is not None:
        compare_checkpoint(fingerprint, checkpoint_data)
    train = [each.batch for each in micro_batches if each.request.split == "train"]
    with _without_side_effects(context):
        if len(train) > 1 and not changed:
            names = [f"objective {each.name}" for each in recipe.objectives] or ["recipe"]
            for name, alone in zip(names, recipe.by_objective(), strict=True):
                _check_loss(context, alone, train, name)
        for micro_batch in micro_batches[len(train) :]:
            title = title_of(micro_batch.request.split)
            warnings += _try_evaluation(context, recipe, micro_batch.batch, title)
    return TrialOutcome(fingerprint=fingerprint, warnings=warnings)


def _read_micro_batches(context: TrainContext) -> list[MicroBatch]:
    """Return the micro-batches of the trial.

    Raises:
        RecipeError: The workers share the position of a file, or their batches do not fit into
            /dev/shm.
        SampleError: The data set raised an exception.
    """
    try:
        micro_batches = []
        for request in context.sampler.trial():
            micro_batches.append(next(context.micro_batches))
            if len(micro_batches) == 1 and request.split == "train":
                check_worker_queues(micro_batches[0], context.plan, shm_bytes())
    except LauncherError as error:
        _check_shared_files(context, error)
        raise
    _check_shared_files(context)
    return micro_batches


def _check_shared_files(context: TrainContext, consequence: LauncherError | None = None) -> None:
    """Refuse data sets that read through a file which the workers share.

    Args:
        context: What is trained.
        consequence: The error that reading raised, if any.

    Raises:
        RecipeError: Reading samples moves the position of a file that was open before the workers
            were forked.
    """
    plan, reader = context.plan, context.reader
    forks = plan.settings["worker_start"] == "fork"
    if plan.workers_per_rank < 2 or not forks or not moved_files(reader.held_files):
        return
    # The rank itself may have moved the position while it built the model, so it reads a sample:
    # what moves now is moved by reading.
    path = reader.find_file_read_through(context.sampler.trial()[0])
    if path is not None:
        raise RecipeError(_shared_file_text(path, plan.workers_per_rank)) from consequence


def _shared_file_text(path: str, num_workers: int) -> str:
    return (
        f"The data set reads from the file {path}, which has been open since data() returned. The "
        f"{num_workers} DataLoader workers share its position, so each moves it under the others, "
        "and samples are wrong. Open the file in __getitem__ when a process first needs it; or set "
        "worker_start=spawn, with which each worker calls data() itself, or num_workers=0."
    )


def _check_loss(
    context: TrainContext, recipe: Recipe, batches: list[Any], name: str = "recipe"
) -> None:
    """Refuse a loss that returns the mean over its items instead of their sum (collective).

    Only a clear mean is refused, because a loss may couple samples or draw random numbers.

    Args:
        context: What is trained.
        recipe: The recipe with the loss.
        batches: A batch and its two halves.
        name: What the loss belongs to, for the message.

    Raises:
        RecipeError: The loss of the batch is the mean of the losses of its halves.
    """
    tolerance = _TOLERANCES[context.plan.precision]
    call_loss = functools.partial(_call_loss, context, recipe)
    losses = _call_on_all_ranks(context, lambda: [call_loss(batch, 1) for batch in batches])
    if losses is None or not context.backend.any_rank(_is_mean(losses, tolerance)):
        return
    reseeded = _call_on_all_ranks(context, lambda: [call_loss(batch, 2) for batch in batches])
    if (
        reseeded is None
        or not _is_mean(reseeded, tolerance)
        or not _is_close(losses[0][0], reseeded[0][0], _SEED_TOLERANCE)
    ):
        return
    (batch_loss, _), (one_half, _), (other_half, _) = losses
    num_samples = len(context.sampler.trial()[0].indices)
    raise RecipeError(
        f"The loss of the {name} returned a mean instead of a sum: {batch_loss:.4g} for "
        f"{num_samples} samples, and {one_half:.4g} and {other_half:.4g} for their halves. Every "
        "gradient would be too small by a factor of the number of items in a micro-batch. Return "
        "(sum, count), as with reduction='sum'; launcher divides by the count over the whole "
        "global batch."
    )


def _call_on_all_ranks(context: TrainContext, function: Callable[[], T]) -> T | None:
    """Return what `function` returns, or None if it raises on any rank (collective).

    Some models work in training only. Running out of memory, a lost rank and errors of launcher are
    raised.
    """
    result = None
    try:
        result = function()
    except (LauncherError, torch.distributed.DistError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
    return None if context.backend.any_rank(result is None) else result


def _is_mean(losses: list[tuple[float, float]], tolerance: float) -> bool:
    """Return whether the first loss is clearly the mean of the others, and not their sum.

    Args:
        losses: (loss, count) of a batch and of its halves.
        tolerance: Relative tolerance.
    """
    (batch_loss, batch_count), *halves = losses
    total = sum(loss for loss, _ in halves)
    items = sum(count for _, count in halves)
    if not math.isfinite(batch_loss + total) or not items:
        return False
    if abs(batch_loss) < torch.finfo().tiny:
        return False
    if not _is_close(batch_count, items, tolerance):  # it counts batches instead of their items
        return False
    mean = sum(loss * count for loss, count in halves) / items
    is_sum = _is_close(batch_loss, total, 10 * tolerance)
    return _is_close(batch_loss, mean, tolerance) and not is_sum


def _is_close(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * abs(one)


def _call_loss(context: TrainContext, recipe: Recipe, batch: Any, seed: int) -> tuple[float, float]:
    """Return (sum, count) of the loss, or (NaN, 0) if it raises: some losses work in training only.

    An exception must not stop this rank, because the model's next forward may be collective.
    """
    torch.manual_seed(seed)
    backend = context.backend
    placed = backend.to_device(batch)
    with backend.autocast():
        outputs = backend.forward(recipe.forward, context.model, placed)
        try:
            total, count = sum_and_count(recipe.loss, outputs, placed, name=LOSS)
            return float(total), float(count)
        except Exception:  # noqa: BLE001  # the first step reports it
            return math.nan, 0.0


def _try_evaluation(
    context: TrainContext, recipe: Recipe, batch: Any, title: str
) -> tuple[str, ...]:
    """Call the loss and each metric on evaluation samples, and return warnings.

    An exception is only a warning: a metric may need more samples than these, or all classes.

    Args:
        context: What is trained.
        recipe: Its loss and metrics are called.
        batch: The samples.
        title: The name of the evaluation set, for the warnings.

    Raises:
        RecipeError: One of them did not return (sum, count).
    """
    torch.manual_seed(0)
    backend = context.backend
    placed = backend.to_device(batch)
    functions = {"The recipe's loss": recipe.loss}
    functions |= {f"The metric {name}": each for name, each in sum_metrics(recipe.metrics).items()}
    with backend.autocast():
        outputs = backend.forward(recipe.forward, context.model, placed)
        errors = {
            name: _catch_error(sum_and_count, function, outputs, placed, name=name)
            for name, function in functions.items()
        }
    try_update = context.collected.try_update
    errors |= {
        f"The metric {name}": _catch_error(try_update, name, outputs, placed)
        for name in prediction_metrics(recipe.metrics)
    }
    return tuple(
        f"{name} raised {class_name(error)} on a few {title} samples before the first "
        f"step: {text_of(error, 2_000)}. The first evaluation may fail in the same way."
        + "".join(f"\n{note}" for note in notes_of(error))
        for name, error in errors.items()
        if error is not None
    )


def _catch_error(function: Callable[..., Any], *arguments: Any, **named: Any) -> Exception | None:
    """Return the exception that a loss or a metric raises, or None.

    Raises:
        RecipeError: It did not return what it must.
    """
    try:
        function(*arguments, **named)
    except LauncherError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return error
    return None


@contextlib.contextmanager
def _without_side_effects(context: TrainContext) -> Iterator[None]:
    """Put the model in evaluation mode, uncompiled; restore modes, buffers and generators.

    Writes to weights, and counters in attributes of modules, are not undone.
    """
    model, device = context.model, context.backend.device
    modes = [(module, module.training) for module in model.modules()]
    buffers = list(_copy_buffers(model))
    generators = Generators()
    gpu = None if device.type == "cpu" else torch.get_device_module(device)
    gpu_state = None if gpu is None else gpu.get_rng_state(device)
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else None
    model.eval()
    try:
        with torch.no_grad(), eager or contextlib.nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if gpu is not None:
            gpu.set_rng_state(gpu_state, device)
        generators.restore()
        with torch.no_grad():
            for module, name, before, content in buffers:
                module._buffers[name] = before.tensor  # noqa: SLF001
                if before.tensor is not None and before.is_written(before.tensor):
                    before.tensor.copy_(content)
        for module, mode in modes:
            module.training = mode


def _copy_buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, TensorVersion, Any]]:
    """Yield the module, name, version and a copy of the content of each buffer."""
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            yield (
                module,
                name,
                read_version(buffer),
                None if buffer is None else buffer.detach().clone(),
            )
