"""Whether the data is the same: on every rank, whenever it is read, and after a resumption."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from launcher.engine.backends.base import Backend
from launcher.engine.data.fingerprint import DataDifference, classes_of, difference
from launcher.engine.data.reader import MicroBatch
from launcher.engine.training.loop import TrainContext
from launcher.errors import CheckpointError, RecipeError

_FRESH = (
    "Make data() return the same in every process: sort what comes from a set or from os.listdir, "
    "seed every generator of your own, and do not number things by hash()."
)
_SEEDED = (
    "Draw random numbers from random, numpy.random or torch, which are seeded for each sample, and "
    "not from a generator of your own"
)


@dataclass(frozen=True, kw_only=True)
class CheckpointData:
    """The data that a run was trained on before."""

    checkpoint: str
    """Name of the checkpoint that it is resumed from."""

    fingerprint: Mapping[str, Any] | None
    """What that holds; None in a checkpoint of an older version."""

    accepted: bool
    """Whether the user has accepted other data."""


def lengths_of(context: TrainContext) -> dict[str, Any]:
    """Return what is known of the data without reading a sample."""
    sampler, data = context.sampler, context.reader.data
    found: dict[str, Any] = {
        "train": {"length": sampler.train_samples, "classes": classes_of(data.train)},
        "evaluation": None,
    }
    if sampler.evaluation_samples:
        classes = classes_of(data.evaluation)
        found["evaluation"] = {"length": sampler.evaluation_samples, "classes": classes}
    return found


def fingerprint_of(
    context: TrainContext, taken: Iterable[MicroBatch]
) -> tuple[dict[str, Any], dict[str, DataDifference]]:
    """Return the fingerprint of the data, and which samples were others when read again."""
    found = lengths_of(context)
    changing: dict[str, DataDifference] = {}
    for each in taken:
        samples = found[each.request.split].setdefault("samples", {})
        for number, description in (each.samples or {}).items():
            differs = difference(samples.get(number, description), description)
            if differs is not None:
                changing[number] = differs
            samples.setdefault(number, description)
    if changing:  # these can be compared with nothing
        for split in (found["train"], found["evaluation"] or {}):
            split.pop("samples", None)
    return found, changing


def compare_ranks(own: dict[str, Any], backend: Backend) -> None:
    """Refuse data that differ between ranks (collective).

    Raises:
        RecipeError: It says what differs, and on which rank.
    """
    found = differing_data(backend.broadcast(own), own)
    if not backend.any_rank(found is not None):
        return
    every = backend.gather(found)
    rank, (what, first, other) = next(
        (rank, each) for rank, each in enumerate(every) if each is not None
    )
    raise RecipeError(
        f"Ranks have other data: {what} is {other} on rank {rank}, and {first} on rank 0. {_FRESH}"
    )


def compare_known(own: dict[str, Any], known: CheckpointData) -> None:
    """Refuse to go on with other data.

    Raises:
        CheckpointError: It says what differs.
    """
    if known.accepted or known.fingerprint is None:
        return
    try:
        found = differing_data(known.fingerprint, own)
    except (KeyError, TypeError, AttributeError, ValueError):
        raise CheckpointError(
            f"{known.checkpoint}: what checkpoint.json says of the data is damaged. Resume from "
            "another with --from, or add `--accept data` to go on without it."
        ) from None
    if found is not None:
        what, before, now = found
        raise CheckpointError(
            f"The data is not what {known.checkpoint} was trained on: {what} is {now}, and was "
            f"{before}. Give the run the data that it had. {_FRESH} To go on with other data on "
            "purpose, add `--accept data`."
        )


def differing_data(one: Mapping[str, Any], other: Mapping[str, Any]) -> DataDifference | None:
    """Return the first difference between two fingerprints: what it is, and both sides of it.

    Samples are compared as far as both have them.
    """
    for split, title in (("train", "training"), ("evaluation", "evaluation")):
        own, against = one.get(split), other.get(split)
        lengths = [0 if each is None else each["length"] for each in (own, against)]
        if lengths[0] != lengths[1]:
            counts = [f"{length:,}" for length in lengths]
            return DataDifference(f"the number of {title} samples", *counts)
        if own is None or against is None:
            continue
        found = difference(own.get("classes"), against.get("classes"))
        if found is not None:
            where = f", at {found.place}," if found.place else ""
            return found._replace(place=f"the list of {title} classes{where}")
        samples, others = own.get("samples", {}), against.get("samples", {})
        for number in (number for number in samples if number in others):
            found = difference(samples[number], others[number])
            if found is not None:
                where = f", at {found.place}," if found.place else ""
                return found._replace(place=f"{title} sample {number}{where}")
    return None


def check_repeatable(context: TrainContext, changing: dict[str, DataDifference]) -> tuple[str, ...]:
    """Refuse samples that depend on when they are read, or on which worker reads them (collective).

    On one rank that is a warning: nothing depends on the number of ranks there.

    Raises:
        RecipeError: There are several ranks, or workers that have called data() each.
    """
    backend = context.backend
    every = backend.gather(next(iter(changing.items()), None))
    found = next((each for each in every if each is not None), None)
    if found is None:
        return ()
    number, (place, before, now) = found
    where = f", at {place}," if place else ""
    text = (
        f"training sample {number}{where} was {before}, and {now} when it was read again. {_SEEDED}"
        ": the samples of a step must not depend on what was read before them."
    )
    if context.recipe.worker_start == "spawn":
        raise RecipeError(f"Samples change: {text} {_FRESH}")
    if backend.world_size > 1:
        raise RecipeError(f"Samples change: {text}")
    return (text,)
