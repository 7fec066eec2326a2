"""Micro-batches of one sample, over which BatchNorm has no statistics: where a run has them."""

from __future__ import annotations

from collections.abc import Iterable

from launcher.planning.global_batch import Statistics
from launcher.planning.plan import Plan
from launcher.planning.stages import short_batches


def planned_statistics(plan: Plan) -> Statistics:
    """Return what BatchNorm takes statistics over by a plan, where the model has it."""
    together = plan.settings.get("sync_batchnorm") and plan.world_size > 1
    return "all" if together else "rank"


def cuts_to_one(plan: Plan, samples: int, statistics: Statistics) -> bool:
    """Return whether even shares of any batch of a run have statistics over a single sample."""
    cut = plan.cut(statistics)
    sizes = _full(plan) | short_batches(plan.stages, samples, plan.total_steps)
    return any(cut.is_paired(size) or cut.is_lone(size) for size in sizes)


def full_batches_of_one(plan: Plan, statistics: Statistics) -> list[int]:
    """Return the sizes of full batches that cannot be cut without a micro-batch of one sample."""
    return sorted(filter(plan.cut(statistics).is_lone, _full(plan)))


def short_batches_of_one(plan: Plan, samples: int, statistics: Statistics) -> list[int]:
    """Return the sizes of batches at the end of an epoch that alone cannot be cut without one."""
    if full_batches_of_one(plan, statistics):
        return []
    short = short_batches(plan.stages, samples, plan.total_steps)
    return sorted(filter(plan.cut(statistics).is_lone, short))


def single_sample_notes(plan: Plan, samples: int | None) -> list[str]:
    """Return what happens to micro-batches of one sample in a model with BatchNorm."""
    statistics = planned_statistics(plan)
    cut, notes = plan.cut(statistics), []
    short = short_batches(plan.stages, samples, plan.total_steps) if samples else set()
    if paired := sorted(filter(cut.is_paired, _full(plan) | short)):
        notes.append(
            f"in a batch of {_listed(paired)} samples some ranks take fewer than others, or none, "
            "so that no micro-batch has exactly one sample"
        )
    if samples and (lone := short_batches_of_one(plan, samples, statistics)):
        notes.append(
            f"the last batch of an epoch, of {_listed(lone)} sample{'s' * (max(lone) > 1)}, has a "
            "micro-batch of one sample, which the running statistics normalise"
        )
    if lone := full_batches_of_one(plan, statistics):
        notes.append(
            f"a batch of {_listed(lone)} samples has micro-batches of one sample, and where "
            "BatchNorm sees one value per channel in them the run is refused"
        )
    return notes


def refusal(plan: Plan, sizes: Iterable[int], name: str) -> str:
    """Return why a run is refused whose BatchNorm `name` would see a single value per channel."""
    return (
        f"BatchNorm ({name}) needs more than one value per channel, and a batch of "
        f"{_listed(sizes)} samples over {plan.world_size} "
        f"rank{'s' * (plan.world_size > 1)} in micro-batches of at most {plan.micro_batch_size} "
        "leaves a micro-batch of one sample. Use another batch_size, fewer ranks, a "
        "micro_batch_size of 3 or more, or sync_batchnorm=true, which takes the statistics over "
        "all ranks. No step was taken."
    )


def _full(plan: Plan) -> set[int]:
    return {stage.batch_size for stage in plan.stages}


def _listed(sizes: Iterable[int]) -> str:
    return " or ".join(map(str, sizes))
