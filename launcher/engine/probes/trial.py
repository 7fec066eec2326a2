"""A few samples looked at before the first step, so that a run that would be wrong is refused.

The DataLoader workers read them as they read all others, before anything else. They show whether
every rank has the same data, and the same data as before a resumption; whether the loss is a sum
over its items; whether the metrics work.
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

from launcher.engine.data.open_files import moved_files
from launcher.engine.data.randomness import Generators
from launcher.engine.data.reader import MicroBatch
from launcher.engine.model.forward_writes import TensorVersion, read_version
from launcher.engine.probes.data_identity import (
    CheckpointData,
    check_repeatable,
    compare_known,
    compare_ranks,
    fingerprint_of,
    lengths_of,
)
from launcher.engine.ranks.failures import is_out_of_memory
from launcher.engine.state.compiled import is_compiled
from launcher.engine.training.loop import TrainContext, sum_and_count
from launcher.errors import LauncherError, RecipeError
from launcher.recipe.recipe import Recipe

T = TypeVar("T")

_TOLERANCES = {"fp64": 1e-2, "fp32": 1e-2, "bf16": 5e-2, "fp16": 5e-2}
"""Relative; between the mean of the halves and their sum lies a factor of two."""

_QUIET = 1e-4
"""Relative change of a loss with the seed up to which the model draws no random numbers."""


@dataclass(frozen=True, kw_only=True)
class TrialOutcome:
    """What a trial has shown."""

    fingerprint: dict[str, Any] | None = None
    """Lengths, classes and a few samples of the data, as values that JSON can hold; None where
    nothing was looked at."""

    warnings: tuple[str, ...] = ()
    """What the user should know, the same on every rank."""


def run_trial(
    context: TrainContext, recipe: Recipe, *, step: int = 0, known: CheckpointData | None = None
) -> TrialOutcome:
    """Look at the samples that the trainee's next micro-batches hold (collective).

    Args:
        context: Its next micro-batches are those of `Sampler.trial`.
        recipe: What is trained; its `forward` is called, and not the trainee's, which counts.
        step: Steps that were taken before.
        known: The data of the run that is resumed; None begins anew.

    Raises:
        RecipeError: Ranks have other data, workers share a file, the loss is a mean, or a metric
            does not return (sum, count).
        CheckpointError: The data is not that of the run that is resumed.
        SampleError: The data set raised.
    """
    backend = context.backend
    compare_ranks(lengths_of(context), backend)
    context.report_phase(step, "reading data")  # from here on the ranks are watched for a hang
    taken = _read(context)
    context.report_phase(step, "computing")
    fingerprint, changing = fingerprint_of(context, taken)
    warnings = check_repeatable(context, changing)
    compare_ranks(fingerprint, backend)
    if known is not None:
        compare_known(fingerprint, known)
    with _undisturbed(context):
        train = [each.batch for each in taken if each.request.split == "train"]
        if len(train) > 1 and not changing:
            _check_loss(context, recipe, train)
        for each in taken:
            if each.request.split == "evaluation":
                warnings += _try_evaluation(context, recipe, each.batch)
    return TrialOutcome(fingerprint=fingerprint, warnings=warnings)


def _read(context: TrainContext) -> list[MicroBatch]:
    """Return the micro-batches of the trial.

    Raises:
        RecipeError: The workers share the position of a file.
        SampleError: The data set raised.
    """
    try:
        taken = [next(context.batches) for _ in context.sampler.trial()]
    except LauncherError as error:
        _check_files(context, error)
        raise
    _check_files(context)
    return taken


def _check_files(context: TrainContext, consequence: LauncherError | None = None) -> None:
    """Refuse data sets that read through a file which the workers share.

    Raises:
        RecipeError: Reading samples moves the position of a file that was open before the workers
            were forked.
    """
    plan, reader = context.plan, context.reader
    forks = plan.settings["worker_start"] == "fork"
    if plan.workers_per_rank < 2 or not forks or not moved_files(reader.held_files):
        return
    # The rank itself may have moved it, while it built the model. So it reads a sample: whatever
    # moves now is what reading moves.
    path = reader.path_read_through(context.sampler.trial()[0])
    if path is not None:
        raise RecipeError(shared_file_text(path, plan.workers_per_rank)) from consequence


def shared_file_text(path: str, workers: int) -> str:
    """Return why a file must not be open before workers are forked, and what to do."""
    return (
        f"The data set reads through the file {path}, which has been open since data() returned, "
        f"and {workers} DataLoader workers share its position: each moves it under the others, "
        "and samples come out wrong. Open the file in __getitem__, when a process first needs it; "
        "or use worker_start=spawn, where each worker calls data() itself, or num_workers=0."
    )


def _check_loss(context: TrainContext, recipe: Recipe, batches: list[Any]) -> None:
    """Refuse a loss that returns the mean over its items as their sum (collective).

    Anything but a clear mean is accepted, for a loss may couple samples or draw random numbers.

    Raises:
        RecipeError: The loss of a batch is the mean of the losses of its halves.
    """
    tolerance = _TOLERANCES[context.plan.precision]
    loss = functools.partial(_loss_of, context, recipe)
    found = _on_all_ranks(context, lambda: [loss(batch, 1) for batch in batches])
    if found is None or not context.backend.any_rank(_is_mean(found, tolerance)):
        return
    again = _on_all_ranks(context, lambda: [loss(batch, 2) for batch in batches])
    if (
        again is None
        or not _is_mean(again, tolerance)
        or not _near(found[0][0], again[0][0], _QUIET)
    ):
        return
    (whole, _), (one, _), (other, _) = found
    size = len(context.sampler.trial()[0].indices)
    raise RecipeError(
        f"The recipe's loss returned a mean instead of a sum: {whole:.4g} for {size} samples, and "
        f"{one:.4g} and {other:.4g} for their halves. Every gradient would be too small, by the "
        "number of items in a micro-batch. Return (sum, count), as with reduction='sum': launcher "
        "divides by the count over the whole global batch."
    )


def _on_all_ranks(context: TrainContext, call: Callable[[], T]) -> T | None:
    """Return what `call` returns; None where it fails on any rank: some models only train.

    What is no fault of the model's ends the run.
    """
    found = None
    try:
        found = call()
    except (LauncherError, torch.distributed.DistError):
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
    return None if context.backend.any_rank(found is None) else found


def _is_mean(found: list[tuple[float, float]], tolerance: float) -> bool:
    """Return whether the first loss is clearly the mean of the others, and not their sum."""
    (whole, count), *halves = found
    total = sum(loss for loss, _ in halves)
    items = sum(count for _, count in halves)
    if not math.isfinite(whole + total) or not items or abs(whole) < torch.finfo().tiny:
        return False
    if not _near(count, items, tolerance):  # it counts micro-batches, not what is in them
        return False
    mean = sum(loss * count for loss, count in halves) / items
    return _near(whole, mean, tolerance) and not _near(whole, total, 10 * tolerance)


def _near(one: float, other: float, tolerance: float) -> bool:
    return abs(one - other) <= tolerance * abs(one)


def _loss_of(context: TrainContext, recipe: Recipe, batch: Any, seed: int) -> tuple[float, float]:
    """Return (sum, count) of the loss, or NaN where it fails: some losses work in training alone.

    The ranks go on alike in any case, for the model's next forward may be collective.
    """
    torch.manual_seed(seed)
    backend = context.backend
    placed = backend.to_device(batch)
    with backend.autocast():
        outputs = recipe.forward(context.model, placed)
        try:
            total, count = sum_and_count(recipe.loss, outputs, placed)
            return float(total), float(count)
        except Exception:  # noqa: BLE001  # the first step tells what it is
            return math.nan, 0.0


def _try_evaluation(context: TrainContext, recipe: Recipe, batch: Any) -> tuple[str, ...]:
    """Call the loss and each metric on evaluation samples; return what the user should know.

    What raises is a warning alone: a metric may need more samples than these, or of every class.

    Raises:
        RecipeError: One returned something else than (sum, count).
    """
    torch.manual_seed(0)
    backend = context.backend
    placed = backend.to_device(batch)
    functions = {"The recipe's loss": recipe.loss}
    functions |= {f"The metric {name}": metric for name, metric in recipe.metrics.items()}
    with backend.autocast():
        outputs = recipe.forward(context.model, placed)
        return tuple(
            f"{name} raised {type(error).__name__} when it was tried on a few evaluation samples: "
            f"{error}. The first evaluation may fail in the same way"
            for name, function in functions.items()
            if (error := _error_of(function, outputs, placed, name)) is not None
        )


def _error_of(function: Any, outputs: Any, batch: Any, name: str) -> Exception | None:
    """Return what a loss or a metric raises.

    Raises:
        RecipeError: It returned something else than (sum, count).
    """
    try:
        sum_and_count(function, outputs, batch, name=name)
    except LauncherError:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        return error
    return None


@contextlib.contextmanager
def _undisturbed(context: TrainContext) -> Iterator[None]:
    """Have the model evaluate, uncompiled; put back modes, buffers and generators afterwards.

    What a forward writes to weights, or counts in attributes of its own, stays.
    """
    model, device = context.model, context.backend.device
    modes = [(module, module.training) for module in model.modules()]
    buffers = list(_buffers(model))
    generators = Generators()
    on_gpu = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    benchmark, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    eager = torch.compiler.set_stance("force_eager") if is_compiled(model) else None
    model.eval()
    try:
        with torch.no_grad(), eager or contextlib.nullcontext():
            yield
    finally:
        torch.backends.cudnn.benchmark = benchmark
        if on_gpu is not None:
            torch.cuda.set_rng_state(on_gpu, device)
        generators.restore()
        with torch.no_grad():
            for module, name, before, content in buffers:
                module._buffers[name] = before.tensor  # noqa: SLF001
                if before.tensor is not None and before.is_written(before.tensor):
                    before.tensor.copy_(content)
        for module, mode in modes:
            module.training = mode


def _buffers(model: nn.Module) -> Iterator[tuple[nn.Module, str, TensorVersion, Any]]:
    """Yield each place for a buffer, what is there, and a copy of its content."""
    for module in model.modules():
        for name, buffer in module._buffers.items():  # noqa: SLF001
            yield (
                module,
                name,
                read_version(buffer),
                None if buffer is None else buffer.detach().clone(),
            )
