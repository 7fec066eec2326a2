"""A recipe tried out before it is trained: what would go wrong, or be wrong, in words."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from launcher.environment.machine import Machine
from launcher.findings import Finding, failure, ok, warning
from launcher.launch.launcher import launch
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.plan import Plan
from launcher.planning.single_sample_batches import single_sample_notes
from launcher.recipe.overrides import Override
from launcher.recipe.resolve import Reference
from launcher.runs.job import Job, describe_run, plan_recipe
from launcher.runs.run_record import write_run
from launcher.runs.rundir import create_run_dir

if TYPE_CHECKING:
    from launcher.engine.probes.inspection import Inspection

_HEAVY = ("torch", "numpy", "pandas", "sklearn", "transformers", "accelerate", "deepspeed")
_SOME = 4
_OPENING = (
    "open files and connections in __getitem__, when a process first needs them, and not in "
    "__init__; or use worker_start=spawn, where each worker calls data() itself"
)


def heavy_imports(before: Collection[str]) -> list[str]:
    """Return which heavy packages have been imported since `before`, a copy of sys.modules."""
    return [name for name in _HEAVY if name in sys.modules and name not in before]


def check_recipe(
    reference: Reference, overrides: Sequence[Override], machine: Machine, signals: SignalHandler
) -> Iterator[Finding]:
    """Plan a recipe, build what it describes, take a batch through it; yield what was found.

    Raises:
        LauncherError: It cannot be planned.
        RunFailedError: The recipe raised an exception.
    """
    from launcher.engine.probes.inspection import read_inspection
    from launcher.engine.worker import agent_inspection

    built, plan = plan_recipe(reference, overrides, machine)
    yield ok("plan", f"batch {plan.batch_size:,}, lr {plan.lr:g}, {plan.total_steps:,} steps")
    with tempfile.TemporaryDirectory(prefix="launcher-check-") as folder:
        run_dir = create_run_dir(Path(folder) / "check", plan.recipe)
        write_run(run_dir, describe_run(reference, built, plan))
        job = Job(
            recipe=reference.location,
            overrides=tuple(overrides),
            plan=replace(plan, nproc_per_node=1),
            run_dir=run_dir,
            launcher_pid=os.getpid(),
            saves=False,
        )
        launch(job, agent_inspection, signals=signals)
        yield from judge(read_inspection(run_dir), plan)


def judge(found: Inspection, plan: Plan) -> Iterator[Finding]:
    """Yield what an inspection says of a recipe that is planned so."""
    yield _data(found)
    model = f"{found.num_trained:,} weights are trained"
    if found.without_gradient:
        yield warning(
            "model",
            f"{model}, and {_some(found.without_gradient)} get no gradient from the loss",
            "use them in forward, or freeze them with requires_grad_(False): their gradients are "
            "zeros, and the weight decay shrinks them",
        )
    else:
        yield ok("model", model)
    if found.outputs_finite:
        yield ok("outputs", f"finite; the loss is {found.loss_per_item:.4g} for each item")
    else:
        yield failure(
            "outputs",
            "the outputs or the loss of the untrained model are not finite",
            "look at the scale of the inputs and of the initial weights",
        )
    yield _loss(found)
    yield from _written(found)
    yield from _metrics(found)
    yield from _split(found)
    if found.batch_norms and (notes := single_sample_notes(plan, found.num_samples)):
        yield warning(
            "BatchNorm",
            "; ".join(notes),
            "a batch_size that divides the training samples has none at the end of an epoch",
        )


def _written(found: Inspection) -> Iterator[Finding]:
    """Yield what forward writes to, which is another on each rank."""
    if found.changed_weights:
        yield warning(
            "weights",
            f"forward writes to {_some(found.changed_weights)}: a run on several ranks is refused",
            "compute what forward uses from the weight without changing it; max_norm of an "
            "Embedding changes it",
        )
    if found.changed_buffers:
        yield warning(
            "buffers",
            f"forward changes {_some(found.changed_buffers)}: where the samples decide how, each "
            "rank has another value, and the run is refused",
            "rank_buffers=average gives every rank their mean after each step, "
            "rank_buffers=broadcast rank 0's",
        )


def _data(found: Inspection) -> Finding:
    evaluation = "none" if found.num_evaluation is None else f"{found.num_evaluation:,}"
    counts = f"{found.num_samples:,} training samples, {evaluation} held out; {found.batch}"
    if found.shared_file is not None:
        return failure(
            "data",
            f"{counts}; DataLoader workers share the position of the open file {found.shared_file},"
            " and each moves it under the others",
            _OPENING,
        )
    if found.differing_in_workers and not found.changing_samples:
        return failure(
            "data",
            f"{counts}; samples {_some(map(str, found.differing_in_workers))} were others when two "
            "DataLoader workers read at once",
            _OPENING,
        )
    if found.changing_samples:
        return failure(
            "data",
            f"{counts}; samples {_some(map(str, found.changing_samples))} were others when they "
            "were read again",
            "draw random numbers from random, numpy.random or torch, which are seeded for each "
            "sample, and not from a generator of your own",
        )
    return ok("data", counts)


def _loss(found: Inspection) -> Finding:
    if found.loss_is_mean:
        return failure(
            "loss", "it returned a mean", "return (sum, count): reduction='sum' and how many"
        )
    if found.loss_is_no_sum:
        return failure(
            "loss",
            "of two halves of a batch it is not the sum of theirs",
            "return the sum over items that do not depend on each other, and how many",
        )
    if found.count != found.items:
        return failure(
            "loss",
            f"it counted {found.count:g} items in a batch of {found.items}",
            "return len(batch[0]) as the count, or give Recipe(count=...), (batch) -> items",
        )
    return ok("loss", f"(sum, count), {found.count:g} items in a batch")


def _metrics(found: Inspection) -> Iterator[Finding]:
    for name, text in found.metrics.items():
        yield failure("metrics", f"{name}: {text}", "return (sum, count), as the loss does")
    if found.empty_metrics:
        yield warning(
            "metrics",
            f"{_some(found.empty_metrics)} counted nothing, or the sum was not finite",
            "look at what they make of evaluation samples",
        )


def _split(found: Inspection) -> Iterator[Finding]:
    if found.batch_norms:
        yield warning(
            "BatchNorm",
            f"{_some(found.batch_norms)}: statistics over the micro-batch of one rank, so that the "
            "steps depend on how the batch is split",
            "sync_batchnorm=true takes them over all ranks; GroupNorm or LayerNorm has none",
        )
    elif found.coupled:
        yield warning(
            "samples",
            "in training the outputs of one depend on the others of its micro-batch",
            "the steps depend on how the batch is split",
        )
    if found.random:
        yield warning(
            "randomness",
            f"the model draws random numbers in training ({_some(found.dropouts) or 'no dropout'})",
            "each rank draws its own, by (seed, step, rank): other ranks, other masks",
        )


def _some(names: Iterable[str]) -> str:
    shown = list(names)
    more = f" and {len(shown) - _SOME} more" if len(shown) > _SOME else ""
    return ", ".join(shown[:_SOME]) + more
