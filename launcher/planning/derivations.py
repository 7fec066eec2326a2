"""The arithmetic of a plan in words, and what its reader should know."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.environment.machine import Machine
from launcher.planning.global_batch import ceil_div
from launcher.planning.stages import Stage, growth_at
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe

_INDEPENDENT = (
    "The samples, the learning rate and the item counts of each step do not depend on the number "
    "of ranks; losses and weights do to floating-point rounding."
)
_DROPOUT = "dropout, of which each rank draws masks of its own, by (seed, step, rank)"


def batch_arithmetic(
    batch_size: int, nodes: int, nproc: int, unit: str, micro: int, accumulation: int
) -> str:
    """Return how a batch is shared: `256 = 2 nodes x 4 GPUs x 16 samples x 2 accumulation steps`.

    Args:
        batch_size: Samples in the global batch.
        nodes: Number of nodes.
        nproc: Ranks on each.
        unit: What a rank is, `GPU` or `CPU rank`.
        micro: The largest micro-batch of any rank.
        accumulation: Micro-batches of each rank.
    """
    world_size = nodes * nproc
    equal = batch_size == world_size * micro * accumulation
    parts = [counted(nodes, "node"), counted(nproc, unit)]
    if equal:
        parts += [counted(micro, "sample"), counted(accumulation, "accumulation step")]
        return f"{batch_size} = {' x '.join(parts)}"
    share = ceil_div(batch_size, world_size)
    each = f"{batch_size // world_size}" + (f" or {share}" if batch_size % world_size else "")
    return (
        f"{batch_size} over {' x '.join(parts)}: {each} samples each, in "
        f"{counted(accumulation, 'accumulation step')} of at most {micro}, weighted exactly"
    )


def stages_text(stages: Sequence[Stage], lr: float, rule: str) -> str:
    """Return how the batch grows: `grows to 512 at step 40 (lr 0.4)`; nothing if it does not."""
    grown = [
        f"{stage.batch_size} from step {stage.first_step + 1:,} (peak lr "
        f"{lr * growth_at(stages, stage.first_step, rule):.3g})"
        for stage in stages[1:]
    ]
    return f"then {', '.join(grown)}" if grown else ""


def steps_arithmetic(
    recipe: Recipe, batch_size: int, samples: int | None, per_epoch: int | None, total: int
) -> str:
    """Return where the number of steps comes from: `72 = 12 epochs x 6 steps; 6 = ceil(...)`."""
    if per_epoch is None or samples is None:
        return f"{total:,}, as asked"
    if recipe.batch_milestones and recipe.epochs is not None:
        return f"{total:,} in {counted(recipe.epochs, 'epoch')} of {samples:,} samples"
    if recipe.batch_milestones:
        return f"{total:,}, as asked"
    derived = f"{per_epoch:,} steps; {per_epoch:,} = ceil({samples:,} samples / {batch_size:,})"
    if recipe.steps is not None:
        return f"{total:,}, as asked: {total / per_epoch:.2f} epochs of {derived}"
    return f"{total:,} = {counted(recipe.epochs or 0, 'epoch')} x {derived}"


def notes_for(
    recipe: Recipe,
    machine: Machine,
    *,
    device: str,
    nproc: int,
    world_size: int,
    micro: int,
    batch_size: int,
) -> tuple[str, ...]:
    """Return what depends on the number of ranks, and what is unusual in a plan."""
    notes = [_INDEPENDENT, _dependent(recipe, world_size, micro, batch_size)]
    if recipe.batch_size_per_gpu is not None:
        notes.append(
            f"batch_size_per_gpu={recipe.batch_size_per_gpu} lets the batch grow with the ranks: "
            "another number of ranks is another training."
        )
    if (
        isinstance(recipe.optimizer, OptimizerSpec)
        and recipe.optimizer.adaptive
        and recipe.lr_rule == "linear"
        and recipe.lr_batch_size not in (None, batch_size)
    ):
        notes.append(
            f"{recipe.optimizer.name} divides gradients by their scale; lr_rule=sqrt suits it "
            "better than linear."
        )
    if device == "cpu" and nproc > machine.usable_cores:
        notes.append(
            f"{nproc} ranks per node share {machine.usable_cores} usable cores "
            f"({machine.cores_limited_by}): they will take turns."
        )
    return tuple(notes)


def _dependent(recipe: Recipe, world_size: int, micro: int, batch_size: int) -> str:
    """Return what another number of ranks, or of accumulation steps, would change."""
    if not recipe.sync_batchnorm:
        return (
            "What does depend on it: BatchNorm, where the model has it, whose statistics are over "
            f"{micro} samples, the micro-batch of one rank (sync_batchnorm=true takes them over "
            f"all ranks); and {_DROPOUT}."
        )
    together = min(world_size * micro, batch_size)
    if together == batch_size:
        return (
            "sync_batchnorm: BatchNorm's statistics are over the global batch, as on one rank. "
            f"What does depend on the ranks: {_DROPOUT}."
        )
    return (
        f"sync_batchnorm: BatchNorm's statistics are over {together} samples, one micro-batch of "
        f"every rank; without accumulation they would be over all {batch_size}. What else depends "
        f"on the ranks: {_DROPOUT}."
    )


def ranks_text(nodes: int, nproc: int) -> str:
    """Return `2 nodes x 4`."""
    return f"{counted(nodes, 'node')} x {nproc}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: `1 node`, `1,250 nodes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
