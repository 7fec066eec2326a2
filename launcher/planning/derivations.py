"""Text for readers of a plan: the arithmetic behind its numbers, and notes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from launcher.environment.machine import Machine
from launcher.planning.global_batch import ceil_div
from launcher.planning.stages import Stage, growth_at
from launcher.planning.virtual_ranks import VirtualRanks
from launcher.recipe.optimizer import OptimizerSpec
from launcher.recipe.recipe import Recipe

_INDEPENDENT = (
    "The samples, the learning rate and the item counts of each step do not depend on the number "
    "of ranks; losses and weights depend on it only by floating-point rounding."
)
_SHOWN_RANKS = 8
"""Number of ranks whose virtual ranks are listed."""

_VIRTUAL = (
    "virtual_ranks={count}: dropout masks and BatchNorm's statistics belong to a part of the "
    "batch, and are the same on 1 to {count} ranks."
)
_EXACT = (
    "exact=true: gradients are summed in one fixed order, and weights are equal to the bit on 1 to "
    "{count} ranks, with the same kind of device and the same versions."
)

_DROPOUT = "dropout, whose masks each rank draws by (seed, step, rank)"
_SHARED_DROPOUT = (
    "dropout, whose masks each rank draws by (seed, step, data rank): ranks of a tensor-parallel "
    "group draw the same mask, for a whole activation or for their own part of it"
)


def batch_arithmetic(
    batch_size: int,
    nodes: int,
    nproc: int,
    unit: str,
    micro: int,
    accumulation: int,
    *,
    tensor_parallel: int = 1,
) -> str:
    """Return how a batch is divided: `256 = 2 nodes x 4 GPUs x 16 samples x 2 accumulation steps`.

    Args:
        batch_size: Samples in the global batch.
        nodes: Number of nodes.
        nproc: Ranks on each node.
        unit: Name for a rank: `GPU` or `CPU rank`.
        micro: Size of the largest micro-batch of any rank.
        accumulation: Micro-batches of each rank.
        tensor_parallel: Neighbouring ranks that take the same samples.
    """
    world_size = nodes * nproc // tensor_parallel
    parts = [counted(nodes, "node"), counted(nproc, unit)]
    if tensor_parallel > 1:
        parts = [counted(world_size, "data rank")]
    if batch_size == world_size * micro * accumulation:
        parts += [counted(micro, "sample"), counted(accumulation, "accumulation step")]
        return f"{batch_size} = {' x '.join(parts)}"
    share = ceil_div(batch_size, world_size)
    shares = f"{batch_size // world_size}" + (f" or {share}" if batch_size % world_size else "")
    return (
        f"{batch_size} over {' x '.join(parts)}: {shares} samples each, in "
        f"{counted(accumulation, 'accumulation step')} of at most {micro}, weighted exactly"
    )


def virtual_arithmetic(
    batch_size: int, distribution: VirtualRanks, micro_batches: int, unit: str
) -> str:
    """Return how a batch is divided: `256 = 8 virtual ranks x 32 samples; on 3 GPUs 3 + 3 + 2`.

    Args:
        batch_size: Samples in the global batch.
        distribution: The distribution of virtual ranks over ranks.
        micro_batches: Micro-batches of each virtual rank.
        unit: Name for a rank: `GPU` or `CPU rank`.
    """
    count, world_size = distribution.count, distribution.world_size
    floor, rest = divmod(batch_size, count)
    each = counted(floor, "sample") if not rest else f"{floor} or {floor + 1} samples"
    sign = "=" if not rest else "over"
    split = f", in {micro_batches} micro-batches each" if micro_batches > 1 else ""
    numbers = [len(distribution.of_rank(rank)) for rank in range(min(world_size, _SHOWN_RANKS))]
    more = " + ..." if world_size > _SHOWN_RANKS else ""
    return (
        f"{batch_size} {sign} {counted(count, 'virtual rank')} x {each}{split}; on "
        f"{counted(world_size, unit)} {' + '.join(map(str, numbers))}{more}"
    )


def stages_text(stages: Sequence[Stage], lr: float, rule: str) -> str:
    """Return how the batch grows: `then 512 from step 40 (peak lr 0.4)`; empty if it does not.

    Args:
        stages: The stages of the run.
        lr: The peak learning rate of the first stage.
        rule: `Recipe.lr_rule`.
    """
    later_stages = [
        f"{stage.batch_size} from step {stage.first_step + 1:,} (peak lr "
        f"{lr * growth_at(stages, stage.first_step, rule):.3g})"
        for stage in stages[1:]
    ]
    return f"then {', '.join(later_stages)}" if later_stages else ""


def steps_arithmetic(
    recipe: Recipe, batch_size: int, samples: int | None, per_epoch: int | None, total: int
) -> str:
    """Return the derivation of the number of steps: `72 = 12 epochs x 6 steps; 6 = ceil(...)`.

    Args:
        recipe: The recipe, which states epochs or steps.
        batch_size: Samples per step in the first stage.
        samples: Training samples; None if unknown.
        per_epoch: Steps per epoch; None if unknown.
        total: Steps of the run.
    """
    if recipe.max_time is not None:
        limit = steps_arithmetic(
            replace(recipe, max_time=None), batch_size, samples, per_epoch, total
        )
        return f"at most {limit}"
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


def tokens_text(recipe: Recipe, batch_size: int) -> str:
    """Return how many tokens a batch has, to append to its arithmetic; empty if unknown."""
    tokens = recipe.tokens_per_sample
    if tokens is None:
        return ""
    return f"; {batch_size * tokens:,} tokens = {batch_size:,} samples x {tokens:,}"


def order_text(recipe: Recipe) -> str:
    """Return how samples are shuffled, and which reads of the storage that makes."""
    window = f"{recipe.shuffle_window:,} samples"
    return {
        "global": (
            "shuffle=global: any sample may come next (random reads over the whole set); "
            "a stream keeps its own order"
        ),
        "window": (
            f"shuffle=window: chunks of the storage in a seeded order, shuffled in windows of "
            f"{window} (sequential reads, chunk by chunk)"
        ),
        "length": (
            f"shuffle=length: batches of similar length, sorted in windows of {window} (random "
            "reads over the whole set)"
        ),
    }[recipe.shuffle]


def quick_checkpoints_text(recipe: Recipe, nodes: int) -> str:
    """Return where quick checkpoints go, and how much room they take; empty if there are none."""
    folder, every = recipe.quick_checkpoints, recipe.quick_checkpoint_every
    if folder is None or every is None:
        return ""
    whose = "its ranks' parts, and those of another node" if nodes > 1 else "on this node alone"
    # The complete one and the one that is being written; each part is on two nodes.
    room = 2 * min(nodes, 2) / nodes
    of_memory = " of memory" if f"{folder}/".startswith("/dev/shm/") else ""  # noqa: S108
    return (
        f"every {counted(every, 'step')} in {folder}, up to {room:.3g} x the size of a "
        f"checkpoint{of_memory} on each node (two of them: {whose})"
    )


def notes_for(
    recipe: Recipe,
    machine: Machine,
    *,
    device: str,
    nproc: int,
    batch_size: int,
) -> tuple[str, ...]:
    """Return the notes of a plan: what is unusual about it.

    Args:
        recipe: The recipe that is planned.
        machine: The machine that each node is taken to be.
        device: `cuda` or `cpu`.
        nproc: Ranks on each node.
        batch_size: Samples in the global batch of the first stage.
    """
    notes = []
    if recipe.batch_size_per_gpu is not None:
        notes.append(
            f"batch_size_per_gpu={recipe.batch_size_per_gpu} lets the batch grow with the ranks: a "
            "different number of ranks is a different training."
        )
    if (
        isinstance(recipe.optimizer, OptimizerSpec)
        and recipe.optimizer.adaptive
        and recipe.lr_rule == "linear"
        and recipe.lr_batch_size not in (None, batch_size)
    ):
        notes.append(
            f"{recipe.optimizer.name} divides gradients by their scale, so that lr_rule=sqrt suits "
            "it better than linear."
        )
    if machine.unusable and recipe.device != "cpu":
        found = " and ".join(machine.unusable)
        advice = " device=cpu trains on the CPU without this note." if device == "cpu" else ""
        notes.append(f"Found {found}. It is not used.{advice}")
    if recipe.tensor_parallel > 1:
        notes.append(
            f"The {recipe.tensor_parallel} ranks of a tensor-parallel group read the same samples, "
            "each by itself."
        )
    if device == "cpu" and nproc > machine.usable_cores:
        notes.append(
            f"{nproc} ranks per node oversubscribe {machine.usable_cores} usable cores "
            f"({machine.cores_limited_by})."
        )
    return tuple(notes)


def dependence_notes(
    *,
    sync_batchnorm: bool,
    world_size: int,
    micro: int,
    batch_size: int,
    tensor_parallel: int = 1,
) -> tuple[str, str]:
    """Return what a different number of ranks or accumulation steps would keep, and would change.

    Args:
        sync_batchnorm: `Recipe.sync_batchnorm`.
        world_size: Ranks, or data ranks, on all nodes.
        micro: Size of the largest micro-batch of any rank.
        batch_size: Samples in the global batch of the first stage.
        tensor_parallel: Neighbouring ranks that take the same samples.
    """
    dropout = _DROPOUT if tensor_parallel == 1 else _SHARED_DROPOUT
    together = min(world_size * micro, batch_size)
    if not sync_batchnorm:
        dependent = (
            "What depends on the number of ranks: BatchNorm, if the model has it, whose statistics "
            f"are over {micro} samples, the micro-batch of one rank (sync_batchnorm=true computes "
            f"them over all ranks); and {dropout}."
        )
    elif together == batch_size:
        dependent = (
            "sync_batchnorm: BatchNorm's statistics are over the global batch, as on one rank. "
            f"What depends on the number of ranks: {dropout}."
        )
    else:
        dependent = (
            f"sync_batchnorm: BatchNorm's statistics are over {together} samples, one micro-batch "
            f"of every rank; without accumulation they would be over all {batch_size}. What else "
            f"depends on the number of ranks: {dropout}."
        )
    return _INDEPENDENT, dependent


def virtual_notes(distribution: VirtualRanks, *, exact: bool) -> tuple[str, ...]:
    """Return what does not depend on the number of ranks in a recipe with virtual ranks.

    Args:
        distribution: The distribution of virtual ranks over ranks.
        exact: `Recipe.exact`.
    """
    virtual = _VIRTUAL.format(count=distribution.count)
    if not exact:
        return _INDEPENDENT, virtual
    copies = counted(distribution.most_copies(), "copy").replace("copys", "copies")
    of_what = "its shard of the gradients" if distribution.interleaved else "the gradients"
    memory = f"exact=true: a rank holds up to {copies} of {of_what} while it adds them."
    return _EXACT.format(count=distribution.count), virtual, memory


def ranks_text(nodes: int, nproc: int) -> str:
    """Return the ranks of a run as text: `2 nodes x 4`."""
    return f"{counted(nodes, 'node')} x {nproc}"


def counted(number: int, noun: str) -> str:
    """Return a number with its noun, singular or plural: `1 node`, `1,250 nodes`."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
