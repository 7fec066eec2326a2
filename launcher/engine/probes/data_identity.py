"""Check that the data is the same on every rank, at every read, and after a resume."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.data.fingerprint import DataDifference, describe_classes, first_difference
from launcher.engine.data.index_fingerprint import describe_index
from launcher.engine.data.micro_batch import MicroBatch
from launcher.engine.data.streams import ENDLESS
from launcher.engine.training.context import TrainContext
from launcher.errors import CheckpointError, RecipeError
from launcher.recipe.evaluation_sets import split_of, title_of

_SAME_IN_EVERY_PROCESS = (
    "Make data() return the same data in every process: sort what comes from a set or from "
    "os.listdir, seed every generator of your own, and do not derive numbers from hash()."
)
_SEEDED_PER_SAMPLE = (
    "Draw random numbers from random, numpy.random or torch, which launcher seeds for each sample, "
    "and not from a generator of your own"
)


@dataclass(frozen=True, kw_only=True)
class CheckpointData:
    """The data of the run that is resumed, as its checkpoint describes it."""

    checkpoint: str
    """Name of the checkpoint."""

    fingerprint: Mapping[str, Any] | None
    """Fingerprint of the data; None in checkpoints of older versions."""

    accepted: bool
    """Whether the user has accepted different data."""


def describe_data(context: TrainContext) -> dict[str, Any]:
    """Return the lengths, classes and indices of the data, known without reading a sample."""
    sampler, data = context.sampler, context.reader.data
    fingerprint: dict[str, Any] = {
        "train": {
            "length": 0 if sampler.train_samples == ENDLESS else sampler.train_samples,
            "classes": describe_classes(data.train),
            "index": describe_index(data.train),
        },
        "evaluation": None,
    }
    sets = data.evaluation_sets()
    for schedule in sampler.evaluations:
        dataset = sets[schedule.name].data
        fingerprint[split_of(schedule.name)] = {
            "length": schedule.samples,
            "classes": describe_classes(dataset),
            "index": describe_index(dataset),
        }
    return fingerprint


def fingerprint_of(
    context: TrainContext, micro_batches: Iterable[MicroBatch]
) -> tuple[dict[str, Any], dict[str, DataDifference]]:
    """Return the fingerprint of the data, and how samples changed between two reads.

    Args:
        context: What is trained.
        micro_batches: The micro-batches of the trial, which carry descriptions of their samples.

    Returns:
        The fingerprint, and for each sample that changed, by its index, the first difference. If
        there are such samples, the fingerprint holds lengths and classes only.
    """
    fingerprint = describe_data(context)
    changed: dict[str, DataDifference] = {}
    for micro_batch in micro_batches:
        samples = fingerprint[micro_batch.request.split].setdefault("samples", {})
        for index, description in (micro_batch.samples or {}).items():
            differs = first_difference(samples.get(index, description), description)
            if differs is not None:
                changed[index] = differs
            samples.setdefault(index, description)
    if changed:
        for split in filter(None, fingerprint.values()):
            split.pop("samples", None)
    return fingerprint, changed


def compare_ranks(fingerprint: dict[str, Any], backend: Backend) -> None:
    """Refuse data that differ between ranks (collective).

    Raises:
        RecipeError: The data differ; the error names the first difference and its rank.
    """
    own_difference = find_difference(backend.broadcast(fingerprint), fingerprint)
    if not backend.any_rank(own_difference is not None):
        return
    differences = backend.gather(own_difference)
    rank, (what, on_rank_0, on_rank) = next(
        (rank, rank_difference)
        for rank, rank_difference in enumerate(differences)
        if rank_difference is not None
    )
    raise RecipeError(
        f"Ranks have different data: {what} is {on_rank} on rank {rank}, but {on_rank_0} on rank "
        f"0. {_SAME_IN_EVERY_PROCESS}"
    )


def compare_schedules(context: TrainContext) -> None:
    """Refuse evaluation sets that ranks would evaluate after different steps (collective).

    Raises:
        RecipeError: The schedules differ; the error names the first rank with another one.
    """
    own = {schedule.name: schedule.every for schedule in context.sampler.evaluations}
    schedules = context.backend.gather(own)
    for rank, other in enumerate(schedules):
        if list(other.items()) != list(schedules[0].items()):
            raise RecipeError(
                f"Ranks have different evaluation sets: they are evaluated every {other} on rank "
                f"{rank}, but every {schedules[0]} on rank 0. {_SAME_IN_EVERY_PROCESS}"
            )


def compare_checkpoint(fingerprint: dict[str, Any], checkpoint_data: CheckpointData) -> None:
    """Refuse to resume with data that differ from those of the checkpoint.

    Checkpoints without a fingerprint, and differences that the user has accepted, pass.

    Raises:
        CheckpointError: The data differ, or the fingerprint in the checkpoint is damaged.
    """
    if checkpoint_data.accepted or checkpoint_data.fingerprint is None:
        return
    try:
        data_difference = find_difference(checkpoint_data.fingerprint, fingerprint)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(
            f"{checkpoint_data.checkpoint}: the fingerprint of the data in checkpoint.json is "
            "damaged. Resume from another checkpoint with --from, or add `--accept data` to resume "
            "without comparing the data."
        ) from None
    if data_difference is not None:
        what, before, now = data_difference
        raise CheckpointError(
            f"The data is not the data that {checkpoint_data.checkpoint} was trained on: {what} is "
            f"{now}, but was {before}. Resume with the same data. {_SAME_IN_EVERY_PROCESS} To "
            "resume with different data on purpose, add `--accept data`."
        )


def find_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> DataDifference | None:
    """Return the first difference between two fingerprints, or None.

    Only samples that are in both fingerprints are compared.
    """
    for split in dict.fromkeys([*one, *other]):
        title = "training" if split == "train" else title_of(split)
        one_split, other_split = one.get(split), other.get(split)
        lengths = [
            0 if split_data is None else split_data["length"]
            for split_data in (one_split, other_split)
        ]
        if lengths[0] != lengths[1]:
            counts = [f"{length:,}" for length in lengths]
            return DataDifference(f"the number of {title} samples", *counts)
        if one_split is None or other_split is None:
            continue
        differs = first_difference(one_split.get("classes"), other_split.get("classes"))
        if differs is not None:
            return differs._replace(place=f"the list of {title} classes{_at(differs.place)}")
        one_index, other_index = one_split.get("index"), other_split.get("index")
        if one_index is not None and other_index is not None:
            differs = first_difference(one_index, other_index)
            if differs is not None:
                return differs._replace(
                    place=f"the fingerprint of the {title} data{_at(differs.place)}"
                )
        one_samples, other_samples = one_split.get("samples", {}), other_split.get("samples", {})
        for index in (index for index in one_samples if index in other_samples):
            differs = first_difference(one_samples[index], other_samples[index])
            if differs is not None:
                return differs._replace(place=f"{title} sample {index}{_at(differs.place)}")
    return None


def check_repeatable(context: TrainContext, changed: dict[str, DataDifference]) -> tuple[str, ...]:
    """Refuse samples that depend on when, or by which worker, they are read (collective).

    Args:
        context: What is trained.
        changed: Samples that changed between two reads on this rank, by index.

    Returns:
        Warnings. On one rank, without spawned workers, changing samples are only a warning, because
        nothing there depends on the number of ranks.

    Raises:
        RecipeError: Samples change, and there are several ranks or spawned workers.
    """
    backend = context.backend
    first_changes = backend.gather(next(iter(changed.items()), None))
    change = next((change for change in first_changes if change is not None), None)
    if change is None:
        return ()
    index, (place, before, now) = change
    text = (
        f"training sample {index}{_at(place)} was {before}, but {now} when it was read again. "
        f"{_SEEDED_PER_SAMPLE}: the samples of a step must not depend on what was read before."
    )
    if context.recipe.worker_start != "fork":
        raise RecipeError(f"Samples change: {text} {_SAME_IN_EVERY_PROCESS}")
    if backend.world_size > 1:
        raise RecipeError(f"Samples change: {text}")
    return (text,)


def stream_notes(context: TrainContext) -> tuple[str, ...]:
    """Return what the user of a stream should know about this run; nothing for other data."""
    if context.reader.stream is None:
        return ()
    ranks = context.backend.world_size
    readers = "the rank reads it" if ranks == 1 else f"each of the {ranks} ranks reads all of it"
    where = "in the rank itself" if not context.plan.workers_per_rank else "in one worker"
    note = (
        f"the training data is a stream: {readers} {where} and keeps its own samples, so a step "
        "has the same samples on any number of ranks, and more ranks or workers do not read it "
        "faster. A resumed run continues from the stream's state_dict, or else reads the stream "
        "again up to its place."
    )
    return (note,)


def _at(place: str) -> str:
    return f", at {place}," if place else ""
