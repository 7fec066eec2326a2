"""`launcher check`: findings about a recipe from planning it and taking a few samples through it.

A failure means that a run would fail or train something else than the recipe describes; a warning
means that the steps depend on the number of ranks, or that a run may fail later.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from launcher.environment.machine import Machine
from launcher.findings import Finding, failure, ok, warning
from launcher.launch.examination import examined
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import single_sample_notes
from launcher.quantities import size
from launcher.recipe.evaluation_sets import split_of, title_of
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import Reference
from launcher.runs.plan_recipe import describe_run, plan_recipe

if TYPE_CHECKING:
    from launcher.engine.probes.inspection import Inspection

_HEAVY_PACKAGES = ("torch", "numpy", "pandas", "sklearn", "transformers", "accelerate", "deepspeed")
_LARGE_GROWTH = 32 << 20
"""Estimated growth of a worker, in bytes, from which on a list of Python objects is named."""

_MAX_NAMES = 4
"""Names listed in a finding; the others are counted."""

_OPEN_PER_PROCESS = (
    "open files and connections in __getitem__, on first use in each process, instead of in "
    "__init__; or set worker_start=spawn, so that each worker calls data() itself"
)


def heavy_imports(before: Collection[str]) -> list[str]:
    """Return the heavy packages imported since `before`, the names in sys.modules at that time."""
    return [name for name in _HEAVY_PACKAGES if name in sys.modules and name not in before]


def heavy_names(reference: Reference) -> list[str]:
    """Return the names of launcher in the file of a recipe whose import loads heavy packages.

    These are the data sets and other parts of the engine, such as `ParquetRows`.
    """
    scope = getattr(inspect.unwrap(reference.function), "__globals__", {})
    return [
        name
        for name, value in scope.items()
        if str(getattr(value, "__module__", "")).startswith("launcher.engine.")
    ]


def check_recipe(
    reference: Reference, overrides: Sequence[Override], machine: Machine, signals: SignalHandler
) -> Iterator[Finding]:
    """Plan a recipe, inspect it in one process on the CPU and yield the findings.

    Args:
        reference: The recipe.
        overrides: Settings to apply to it.
        machine: The machine to plan for.
        signals: Handler of the signals that stop the inspection.

    Raises:
        LauncherError: The recipe cannot be planned.
        RunFailedError: The recipe raised an exception.
    """
    from launcher.engine.probes.inspection import read_inspection
    from launcher.engine.worker import agent_inspection

    built, plan = plan_recipe(reference, overrides, machine)
    yield ok("plan", f"batch {plan.batch_size:,}, lr {plan.lr:g}, {plan.total_steps:,} steps")
    process_plan = replace(plan, nproc_per_node=1)
    description = describe_run(reference, built, plan)
    with examined(
        reference, overrides, description, process_plan, agent_inspection, signals
    ) as run_dir:
        yield from findings_about(read_inspection(run_dir), plan)


def findings_about(inspection: Inspection, plan: Plan) -> Iterator[Finding]:
    """Yield the findings about an inspected recipe. `plan` is that of the intended run."""
    yield _data(inspection)
    yield from _workers(inspection, plan)
    trainable = f"{inspection.num_trained:,} trainable parameters"
    if inspection.without_gradient:
        yield warning(
            "model",
            f"{trainable}, of which {_listed(inspection.without_gradient)} get no gradient from "
            "the loss",
            "use them in forward, or freeze them with requires_grad_(False): otherwise their "
            "gradients are zero and weight decay still shrinks them",
        )
    else:
        yield ok("model", trainable)
    if inspection.outputs_finite:
        yield ok("outputs", f"finite; the loss is {inspection.loss_per_item:.4g} per item")
    else:
        yield failure(
            "outputs",
            "the outputs or the loss of the untrained model are not finite",
            "check the scale of the inputs and of the initial weights",
        )
    yield _loss(inspection)
    yield from _writes(inspection, plan)
    yield from _evaluation(inspection)
    if plan.virtual_ranks is None:
        yield from _split_dependence(inspection, plan)
    yield from _randomness(inspection, plan)
    notes = single_sample_notes(plan, inspection.num_samples) if inspection.batch_norms else []
    if notes:
        yield warning(
            "BatchNorm",
            "; ".join(notes),
            "choose a batch_size that divides the number of training samples: every batch of an "
            "epoch is then full",
        )


def _writes(inspection: Inspection, plan: Plan) -> Iterator[Finding]:
    """Yield findings about weights and buffers that forward modifies, differently on each rank."""
    if inspection.changed_weights:
        yield warning(
            "weights",
            f"forward writes to {_listed(inspection.changed_weights)}: a run on several ranks is "
            "refused",
            "compute what forward needs from the weight without modifying it; max_norm of an "
            "Embedding modifies it",
        )
    if inspection.changed_buffers and plan.virtual_ranks is not None:
        yield warning(
            "buffers",
            f"forward changes {_listed(inspection.changed_buffers)}, which belongs to no virtual "
            "rank: the run is refused",
            "compute the buffer from values that do not depend on the samples, or leave "
            "virtual_ranks out",
        )
    elif inspection.changed_buffers:
        yield warning(
            "buffers",
            f"forward changes {_listed(inspection.changed_buffers)}: if the new values depend on "
            "the samples, they differ between ranks and the run is refused",
            "set rank_buffers=average to give every rank the mean after each step, or "
            "rank_buffers=broadcast to give every rank the values of rank 0",
        )


def _data(inspection: Inspection) -> Finding:
    evaluation = [
        f"{samples:,} {title_of(split_of(name))}"
        for name, samples in inspection.evaluation_samples.items()
    ]
    train = f"{inspection.num_samples:,} training samples"
    if inspection.is_stream:
        train = f"a stream of {train}" if inspection.num_samples else "a stream for training"
        train += (
            " (all ranks read all of it and keep their own samples, so steps have the same samples "
            "on any number of ranks)"
        )
    counts = f"{train}, {', '.join(evaluation) or 'no evaluation'} samples; {inspection.batch}"
    if inspection.shared_file is not None:
        return failure(
            "data",
            f"{counts}; DataLoader workers share the open file {inspection.shared_file}, and a "
            "read in one moves the file position of all",
            _OPEN_PER_PROCESS,
        )
    if inspection.differing_in_workers and not inspection.changing_samples:
        samples = _listed(map(str, inspection.differing_in_workers))
        return failure(
            "data",
            f"{counts}; samples {samples} changed when two DataLoader workers read at the same "
            "time",
            _OPEN_PER_PROCESS,
        )
    if inspection.changing_samples and inspection.is_stream:
        samples = _listed(map(str, inspection.changing_samples))
        return failure(
            "data",
            f"{counts}; samples {samples} differ when the stream is read again, so ranks would "
            "take samples twice or not at all, and no resumed run would find its place",
            "seed the shuffling of the stream, and do not divide it among ranks or workers",
        )
    if inspection.changing_samples:
        samples = _listed(map(str, inspection.changing_samples))
        return failure(
            "data",
            f"{counts}; samples {samples} changed when they were read a second time",
            "draw random numbers from the global generators of random, numpy.random or torch, "
            "which are seeded for each sample, instead of from a generator of your own",
        )
    return ok("data", counts)


def _workers(inspection: Inspection, plan: Plan) -> Iterator[Finding]:
    """Yield findings about the memory of DataLoader workers, and about threads in them."""
    if inspection.thread_conflict is not None:
        yield failure(
            "worker_threads",
            f"several threads of a process must not read the samples: {inspection.thread_conflict}",
            "set worker_threads=1 and a larger num_workers, whose processes share nothing",
        )
    if not plan.workers_per_rank:
        return
    large = [each for each in inspection.object_lists if each.growth_bytes >= _LARGE_GROWTH]
    if not large:
        return
    listed = ", ".join(
        f"{each.name} is a {each.kind} of {each.length:,} elements ({each.objects:,} Python "
        f"objects, about {size(each.growth_bytes)})"
        for each in large[:_MAX_NAMES]
    )
    workers = plan.nproc_per_node * plan.workers_per_rank
    total = sum(each.growth_bytes for each in large)
    how = (
        "a forked worker shares them at first, and copies each page of them when it reads an "
        "object there, because reading changes the object's count of references"
        if plan.settings["worker_start"] == "fork"
        else "each worker creates its own"
    )
    yield warning(
        "host memory",
        f"{listed}; {how}. The {workers} workers of a node grow by up to {size(total * workers)}",
        "keep numbers in a NumPy array or a tensor, and texts in a NumPy array of strings or bytes "
        "(numpy.array(texts), dtype U or S) or in Arrow, and make Python objects in __getitem__; "
        "or use fewer num_workers with more worker_threads, which share them",
    )


def _loss(inspection: Inspection) -> Finding:
    if inspection.loss_is_mean:
        return failure(
            "loss",
            "it returns a mean over the batch",
            "return (sum, count): the sum, as with reduction='sum', and the number of items",
        )
    if inspection.loss_is_not_sum:
        return failure(
            "loss",
            "the loss of a batch is not the sum of the losses of its two halves",
            "return the sum over items that do not depend on each other, and the number of items",
        )
    if inspection.count != inspection.items:
        return failure(
            "loss",
            f"it counts {inspection.count:g} items in a batch of {inspection.items}",
            "return len(batch[0]) as the count, or set Recipe(count=...) to a function that "
            "returns the number of items in a batch",
        )
    found = f"returns (sum, count), {inspection.count:g} items in a batch"
    if inspection.loss_is_not_compared:
        found += (
            "; whether it is a sum over them was not tested, because the model draws random "
            "numbers in evaluation that cannot be repeated, or works in training only"
        )
    return ok("loss", found)


def _evaluation(inspection: Inspection) -> Iterator[Finding]:
    """Yield findings from a forward pass over evaluation samples, and from the metrics of it."""
    for name, error in inspection.evaluation_errors.items():
        if name.rpartition("/")[2] in ("forward", "loss"):
            remedy = "make it work in evaluation mode, or leave evaluation= out of Data"
            yield failure("evaluation", f"{name}: {error}", remedy)
        else:
            remedy = "return (sum, count) for evaluation samples, as the loss does"
            yield failure("metrics", f"{name}: {error}", remedy)
    if inspection.empty_metrics:
        yield warning(
            "metrics",
            f"{_listed(inspection.empty_metrics)} counted 0 items, or returned a sum that is not "
            "finite",
            "check what they compute from evaluation samples",
        )


def _split_dependence(inspection: Inspection, plan: Plan) -> Iterator[Finding]:
    """Yield findings about a model whose steps depend on how a batch is split over ranks."""
    is_synced = bool(plan.settings["sync_batchnorm"])
    if inspection.batch_norms and is_synced and plan.accumulation_steps > 1:
        yield warning(
            "BatchNorm",
            f"{_listed(inspection.batch_norms)}: statistics are taken over one micro-batch of all "
            f"ranks, a part of the batch, because it is accumulated in {plan.accumulation_steps} "
            "micro-steps; the steps depend on their number",
            "set a larger micro_batch_size, so that nothing is accumulated, or use GroupNorm or "
            "LayerNorm, which have no batch statistics",
        )
    elif inspection.batch_norms and not is_synced:
        yield warning(
            "BatchNorm",
            f"{_listed(inspection.batch_norms)}: statistics are taken over the micro-batch of one "
            "rank, so the steps depend on how the batch is split",
            "set sync_batchnorm=true to take them over all ranks, or virtual_ranks to take them "
            "over the same parts on any number of ranks, or use GroupNorm or LayerNorm, which have "
            "no batch statistics",
        )
    elif inspection.coupled and not inspection.batch_norms:
        yield warning(
            "samples",
            "in training, the loss of a sample depends on the other samples of its micro-batch",
            "compute the outputs of a sample from that sample alone, or accept steps that depend "
            "on how the batch is split",
        )


def _randomness(inspection: Inspection, plan: Plan) -> Iterator[Finding]:
    """Yield findings about random numbers that depend on how a batch is split over ranks."""
    if not inspection.random:
        return
    if plan.virtual_ranks is not None and not inspection.random_in_evaluation:
        return  # the numbers are those of a virtual rank
    dropouts = _listed(inspection.dropouts)
    source = f"Dropout: {dropouts}" if dropouts else "forward or the loss draws random numbers"
    when = "in training and evaluation" if inspection.random_in_evaluation else "in training"
    remedy = (
        "remove it, set virtual_ranks, with which training draws the same numbers on any number of "
        "ranks, or accept that another number of ranks draws other numbers: each rank draws its "
        "own, seeded by (seed, step, rank)"
    )
    if plan.virtual_ranks is not None:
        remedy = "draw random numbers in training alone, where they are those of a virtual rank"
    yield warning("randomness", f"{when}, the outputs are random ({source})", remedy)


def _listed(names: Iterable[str]) -> str:
    """Return the first names, separated by commas, and the number of the others."""
    listed = list(names)
    num_more = len(listed) - _MAX_NAMES
    more = f" and {num_more} more" if num_more > 0 else ""
    return ", ".join(listed[:_MAX_NAMES]) + more
