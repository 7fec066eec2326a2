"""Micro-batches of one sample, for which BatchNorm has no statistics, and where they occur.

Statistics over one value per channel have no variance. `BatchSplit` avoids such micro-batches where
it can; this module says where it cannot.
"""

from __future__ import annotations

from collections.abc import Iterable

from launcher.planning.global_batch import Statistics
from launcher.planning.plan import Plan
from launcher.planning.stages import short_batches


def planned_statistics(plan: Plan) -> Statistics:
    """Return the micro-batches that BatchNorm, if the model has it, computes statistics over."""
    together = plan.settings.get("sync_batchnorm") and plan.data_ranks > 1
    return "all" if together else "rank"


def has_single_sample_batches(plan: Plan, samples: int, statistics: Statistics) -> bool:
    """Return whether even shares of any batch of a run have statistics over a single sample.

    Args:
        plan: The plan of the run.
        samples: Training samples.
        statistics: The micro-batches that BatchNorm computes statistics over.
    """
    cut = plan.cut(statistics)
    sizes = _full_batches(plan) | short_batches(plan.stages, samples, plan.total_steps)
    return any(cut.avoids_single_samples(size) or cut.has_single_sample(size) for size in sizes)


def full_batches_of_one(plan: Plan, statistics: Statistics) -> list[int]:
    """Return the sizes of full batches with an unavoidable micro-batch of one sample."""
    return sorted(filter(plan.cut(statistics).has_single_sample, _full_batches(plan)))


def short_batches_of_one(plan: Plan, samples: int, statistics: Statistics) -> list[int]:
    """Return the sizes of short last batches with an unavoidable micro-batch of one sample.

    The result is empty if full batches have such micro-batches as well.
    """
    if full_batches_of_one(plan, statistics):
        return []
    short = short_batches(plan.stages, samples, plan.total_steps)
    return sorted(filter(plan.cut(statistics).has_single_sample, short))


def single_sample_notes(plan: Plan, samples: int | None) -> list[str]:
    """Return notes on how a run of a model with BatchNorm treats micro-batches of one sample.

    Args:
        plan: The plan of the run.
        samples: Training samples; None if unknown.
    """
    statistics = planned_statistics(plan)
    cut, notes = plan.cut(statistics), []
    unit = "rank" if plan.virtual_ranks is None else "virtual rank"
    short = short_batches(plan.stages, samples, plan.total_steps) if samples else set()
    if paired := sorted(filter(cut.avoids_single_samples, _full_batches(plan) | short)):
        notes.append(
            f"in a batch of {_join(paired)} samples some {unit}s take fewer micro-batches than "
            "others, or none, so that no micro-batch has exactly one sample"
        )
    if samples and (lone := short_batches_of_one(plan, samples, statistics)):
        notes.append(
            f"the last batch of an epoch, of {_join(lone)} sample{'s' * (max(lone) > 1)}, has a "
            "micro-batch of one sample, which is normalised by the running statistics"
        )
    if lone := full_batches_of_one(plan, statistics):
        notes.append(
            f"a batch of {_join(lone)} samples has micro-batches of one sample, and the run is "
            "refused if BatchNorm sees one value per channel in them"
        )
    return notes


def batch_norm_refusal(plan: Plan, sizes: Iterable[int], name: str) -> str:
    """Return the message that refuses a run whose BatchNorm would see one value per channel.

    Args:
        plan: The plan of the run.
        sizes: The batch sizes that have a micro-batch of one sample.
        name: Name of the BatchNorm module.
    """
    parts, unit = plan.data_ranks, "rank"
    remedy = (
        "fewer ranks, a micro_batch_size of 3 or more, or sync_batchnorm=true, which computes the "
        "statistics over all ranks"
    )
    if plan.virtual_ranks is not None:
        parts, unit = plan.virtual_ranks, "virtual rank"
        remedy = "fewer virtual_ranks, or a micro_batch_size of 3 or more"
    return (
        f"BatchNorm ({name}) needs more than one value per channel, and a batch of "
        f"{_join(sizes)} samples over {parts} {unit}{'s' * (parts > 1)} in micro-batches of at "
        f"most {plan.micro_batch_size} leaves a micro-batch of one sample. Use another batch_size, "
        f"{remedy}. No step was taken."
    )


def _full_batches(plan: Plan) -> set[int]:
    """Return the sizes of the full batches of all stages."""
    return {stage.batch_size for stage in plan.stages}


def _join(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sizes))
