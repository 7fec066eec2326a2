"""Compare two finished runs: what must be equal exactly, and what must agree to rounding."""

from __future__ import annotations

import contextlib
import hashlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
import safetensors.torch
import torch
from torch import Tensor

from launcher.engine.saving.checkpoint_tensors import StoredState
from launcher.errors import RunDirError
from launcher.json_file import read_lines
from launcher.paths import is_file
from launcher.runs.checkpoints import Checkpoint
from launcher.runs.rundir import RunDir

_EXACT = {"samples": "sample ids", "lr": "learning rate", "items": "item counts"}
"""Fields of `Trace` that must be equal exactly, and their names in `ParityDifference.unequal`."""


class _Step(msgspec.Struct, frozen=True):
    """A line of metrics.jsonl about a step; null stands for a number that is not finite."""

    lr: float
    items: int
    loss: float | None
    grad_norm: float | None


class _Samples(msgspec.Struct, frozen=True):
    """A line about the samples that a rank took in a step, by micro-batch."""

    step: int
    micro_batches: list[list[int]]


class _Evaluation(msgspec.Struct, frozen=True):
    """A line about an evaluation."""

    step: int
    evaluation: dict[str, float | None]


@dataclass(frozen=True, kw_only=True)
class Trace:
    """The steps of a finished run, as its run folder records them."""

    samples: list[list[int]]
    """Sample ids of each step over all ranks and micro-steps, sorted."""

    lr: list[float]
    items: list[int]
    loss: list[float]
    grad_norm: list[float]
    weights: dict[str, Tensor]
    """The final weights, by name."""

    evaluations: dict[tuple[int, str], float]
    """The metrics of all evaluations, by step and name."""


@dataclass(frozen=True, kw_only=True)
class ParityDifference:
    """The difference between two runs."""

    unequal: dict[str, int]
    """Quantities that must be equal but are not, each with the first step that differs, counted
    from 1."""

    loss: float
    """Largest relative difference of the loss over all steps."""

    grad_norm: float
    """Largest relative difference of the gradient norm over all steps."""

    weights: float
    """Largest difference of a weight, relative to the largest weight of its tensor."""

    weight: str
    """Name of the tensor with this difference; empty if the weights are equal."""

    first_step: int | None
    """First step whose loss or gradient norm differs by more than the tolerance, counted from 1;
    None if there is none."""

    tolerance: float

    @property
    def agrees(self) -> bool:
        """Whether the runs differ only by rounding."""
        return self.steps_agree and self.weights <= self.tolerance

    @property
    def steps_agree(self) -> bool:
        """Whether all that was recorded of the steps, the final weights apart, agrees."""
        return not self.unequal and max(self.loss, self.grad_norm) <= self.tolerance


def read_trace(run_dir: RunDir) -> Trace:
    """Return the trace of a finished run.

    Args:
        run_dir: The folder of a run that was trained with record_samples=true.

    Raises:
        RunDirError: The folder lacks steps, samples or final weights.
    """
    folder = run_dir.samples(0).parent
    rows = read_lines(run_dir.metrics, msgspec.json.Decoder(_Step))
    samples: dict[int, list[int]] = {}
    for path in folder.glob("rank*.jsonl"):
        for line in read_lines(path, msgspec.json.Decoder(_Samples)):
            step_samples = samples.setdefault(line.step, [])
            step_samples += [index for micro_batch in line.micro_batches for index in micro_batch]
    if not (rows and folder.is_dir() and is_file(run_dir.model)):
        raise RunDirError(
            f"{run_dir.shown} cannot be compared with another run: it lacks metrics.jsonl, "
            "samples/ or model.safetensors. Train it to its end with record_samples=true."
        )
    return Trace(
        samples=[sorted(samples[step]) for step in sorted(samples)],
        lr=[row.lr for row in rows],
        items=[row.items for row in rows],
        loss=[_number(row.loss) for row in rows],
        grad_norm=[_number(row.grad_norm) for row in rows],
        weights=safetensors.torch.load_file(run_dir.model),
        evaluations={
            (row.step, name): _number(value)
            for row in read_lines(run_dir.metrics, msgspec.json.Decoder(_Evaluation))
            for name, value in row.evaluation.items()
        },
    )


def compare(reference: Trace, other: Trace, tolerance: float) -> ParityDifference:
    """Return the difference between two runs of the same recipe.

    Args:
        reference: The run to compare with; relative differences are relative to its values.
        other: The run to compare.
        tolerance: Relative difference up to which values agree.
    """
    unequal = {
        title: step
        for name, title in _EXACT.items()
        if (
            step := _find_first_step(
                getattr(reference, name), getattr(other, name), lambda a, b: a != b
            )
        )
    }

    def is_beyond(a: float, b: float) -> bool:
        return _relative_difference(a, b) > tolerance

    steps = [
        step
        for name in ("loss", "grad_norm")
        if (step := _find_first_step(getattr(reference, name), getattr(other, name), is_beyond))
    ]
    with _on_one_thread():
        weights, weight = max(
            (_tensor_difference(tensor, other.weights[name]), name)
            for name, tensor in reference.weights.items()
        )
    return ParityDifference(
        unequal=unequal,
        loss=max(map(_relative_difference, reference.loss, other.loss)),
        grad_norm=max(map(_relative_difference, reference.grad_norm, other.grad_norm)),
        weights=weights,
        weight=weight if weights else "",
        first_step=min(steps, default=None),
        tolerance=tolerance,
    )


def compare_evaluations(reference: Trace, other: Trace) -> tuple[float, float] | None:
    """Return how far the evaluations of two runs are apart; None if there were none.

    Other metrics than a loss may jump where rounding changes one answer, such as an accuracy.

    Returns:
        The largest relative difference of a loss, and of any metric. It is infinite if one of the
        runs lacks a metric.
    """
    a, b = reference.evaluations, other.evaluations
    if not a and not b:
        return None
    differences = {
        key: _relative_difference(a[key], b[key]) if key in a and key in b else math.inf
        for key in a.keys() | b.keys()
    }
    losses = [value for (_, name), value in differences.items() if name.split("/")[-1] == "loss"]
    return max(losses, default=0.0), max(differences.values())


def checkpoint_digest(checkpoint: Checkpoint) -> str:
    """Return the SHA-256 of the names and the bits of all tensors in a checkpoint.

    These are the weights, the optimizer's state and the buffers, BatchNorm's statistics of each
    virtual rank included.
    """
    state = StoredState(checkpoint, checkpoint.read_manifest())
    tensors = {
        name: torch.empty(state.size(name) or (), dtype=state.dtype(name)) for name in state.names()
    }
    state.read(tensors)
    return tensors_digest(tensors)


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, dtypes, shapes and bits of tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


@contextlib.contextmanager
def _on_one_thread() -> Iterator[None]:
    """Let torch compute without starting threads, which a later fork of this process would lose."""
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(num_threads)


def _find_first_step(
    reference: list[Any], other: list[Any], differs: Callable[[Any, Any], bool]
) -> int | None:
    """Return the first step, counted from 1, at which two lists differ, also in length."""
    pairs = enumerate(zip(reference, other, strict=False), start=1)
    if step := next((step for step, (a, b) in pairs if differs(a, b)), None):
        return step
    if len(reference) != len(other):
        return min(len(reference), len(other)) + 1
    return None


def _number(value: float | None) -> float:
    """Return a number of metrics.jsonl, which holds null for one that is not finite."""
    return math.nan if value is None else value


def _relative_difference(reference: float, other: float) -> float:
    """Return the difference relative to `reference`; infinity if only one of them is finite."""
    if reference == other or (math.isnan(reference) and math.isnan(other)):
        return 0.0
    difference = abs(other - reference) / max(abs(reference), 1e-30)
    return difference if math.isfinite(difference) else math.inf


def in_float64(tensor: Tensor) -> Tensor:
    """Return a tensor in float64; complex numbers as pairs of it, in a further dimension."""
    return (torch.view_as_real(tensor.resolve_conj()) if tensor.is_complex() else tensor).double()


def _tensor_difference(reference: Tensor, other: Tensor) -> float:
    """Return the largest difference of an element, relative to the largest of `reference`.

    Elements that are equal, or NaN in both, do not differ; any other element that is not finite
    makes the difference infinite.
    """
    a, b = in_float64(reference), in_float64(other)
    differs = ~((a == b) | (a.isnan() & b.isnan()))
    if not differs.any():
        return 0.0
    largest = (b - a)[differs].abs().max().item()
    relative = largest / max(a.abs().max().item(), 1e-30)
    return relative if math.isfinite(relative) else math.inf
