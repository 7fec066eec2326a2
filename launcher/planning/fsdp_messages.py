"""What the ranks send each other in a step under FSDP, and what a plan says about it.

All amounts are multiples of the size of all weights, because a plan does not know the model.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from launcher.planning.sharding import Sent, Sharding
from launcher.recipe.recipe import Recipe


@dataclass(frozen=True, kw_only=True)
class StepCollectives:
    """The collectives of a step under FSDP, and the sizes of what they send."""

    gathers: int
    """How often the weights of blocks are gathered."""

    outside: int
    """How often the weights outside of blocks are gathered: once for forward and backward."""

    reductions: int
    """How often gradients are reduced within a group."""

    sums: float
    """How often gradients are summed over the copies; exact sums take 1.5 times as much."""

    gathered_size: float = 1.0
    """Size of a gathered weight over that of the weight, such as 0.5 in bf16."""

    reduced_size: float = 1.0
    """Size of a reduced gradient over that of the weight."""

    def sent(self, sharding: Sharding) -> Sent:
        """Return what is sent in a step if all weights are in blocks, which is the most."""
        times = self.gathers * self.gathered_size + self.reductions * self.reduced_size
        gathered, summed = sharding.gathered(), sharding.summed_over_copies()
        sums = self.sums * self.reduced_size if sharding.copies > 1 else 0.0
        return Sent(
            times * gathered.inside + sums * summed.inside,
            times * gathered.between + sums * summed.between,
        )


def defers_sums(settings: Mapping[str, Any]) -> bool:
    """Return whether copies add their gradients in the last micro-step of a step alone.

    Until then a rank keeps the sum over its group in the precision of the reduction, which must
    therefore be that of the weights. The noise scale is measured from the sum over all ranks after
    the first micro-step.

    Args:
        settings: The settings of the recipe.
    """
    if settings.get("reduce_dtype", "fp32") != "fp32":
        return False
    return bool(settings["exact"] or not settings["noise_scale"])


def collectives_for(settings: Mapping[str, Any], accumulation: int, rounds: int) -> StepCollectives:
    """Return the collectives of a step under FSDP.

    Args:
        settings: The settings of the recipe. A run folder of an earlier version lacks some.
        accumulation: Micro-steps of a step.
        rounds: Virtual ranks that a rank computes in a step; 1 without virtual ranks.
    """
    reductions = accumulation
    if settings["exact"]:
        reductions = rounds
    elif settings.get("accumulate_unsharded"):
        reductions = 1
    sums: float = 1 if defers_sums(settings) else reductions
    in_half = settings["precision"] in ("bf16", "fp16")
    return StepCollectives(
        outside=accumulation,
        gathers=accumulation * (2 if settings.get("reshard_after_forward", True) else 1),
        reductions=reductions,
        sums=1.5 * sums if settings["exact"] else sums,
        gathered_size=0.5 if in_half else 1.0,
        reduced_size=0.5 if settings.get("reduce_dtype") == "bf16" else 1.0,
    )


def messages_text(sharding: Sharding, collectives: StepCollectives) -> str:
    """Return how much the ranks send in a step: `weights gathered 2 times, ... x the weights`."""
    gathered = f"per step, weights are gathered {_times(collectives.gathers)}"
    if collectives.outside != collectives.gathers:
        gathered += f" ({_times(collectives.outside)} outside of blocks)"
    reduced = f"gradients reduced {_times(collectives.reductions)}"
    sums = ""
    if sharding.copies > 1:
        count = collectives.reductions if collectives.sums >= collectives.reductions else 1
        sums = f" and summed over copies {_times(count)}"
    more = ", besides activations" if sharding.tensor_parallel > 1 else ""
    return f"{gathered}, {reduced}{sums}: {_sent_text(sharding, collectives)}{more}"


def alternatives(
    recipe: Recipe, sharding: Sharding, accumulation: int, rounds: int
) -> tuple[str, ...]:
    """Return what the settings that exchange memory for messages would change in a plan.

    Args:
        recipe: The recipe.
        sharding: The groups of ranks.
        accumulation: Micro-steps of a step.
        rounds: Virtual ranks that a rank computes in a step; 1 without virtual ranks.
    """
    shard = f"1/{sharding.size} of the weights' size"
    texts = []

    def compared(name: str, value: str, **changes: Any) -> str:
        changed = collectives_for(recipe.settings() | changes, accumulation, rounds)
        return f"with {name}={value}: {_sent_text(sharding, changed)}"

    if recipe.reshard_after_forward:
        text = compared("reshard_after_forward", "false", reshard_after_forward=False)
        texts.append(
            f"{text}, and a rank holds all gathered weights from forward to backward, not one block"
        )
    else:
        text = compared("reshard_after_forward", "true", reshard_after_forward=True)
        texts.append(
            f"{text}, and a rank holds the gathered weights of one block at a time, not all"
        )
    if accumulation == 1 or recipe.exact:
        return tuple(texts)
    if recipe.accumulate_unsharded:
        text = compared("accumulate_unsharded", "false", accumulate_unsharded=False)
        texts.append(f"{text}, and gradients take {shard} on a rank instead of all of it")
    elif recipe.reduce_dtype == "fp32" and not recipe.noise_scale:
        text = compared("accumulate_unsharded", "true", accumulate_unsharded=True)
        texts.append(f"{text}, and gradients take the weights' size on a rank instead of {shard}")
    return tuple(texts)


def sharding_texts(
    recipe: Recipe, sharding: Sharding | None, accumulation: int, rounds: int
) -> dict[str, str]:
    """Return the lines of a plan about the groups of ranks and their messages; empty without FSDP.

    Args:
        recipe: The recipe.
        sharding: The groups of ranks; None for other strategies.
        accumulation: Micro-steps of a step.
        rounds: Virtual ranks that a rank computes in a step; 1 without virtual ranks.
    """
    if sharding is None:
        return {}
    return {
        "shards": sharding.text(),
        "messages": messages_text(
            sharding, collectives_for(recipe.settings(), accumulation, rounds)
        ),
        "alternatives": "\n".join(alternatives(recipe, sharding, accumulation, rounds)),
    }


def _sent_text(sharding: Sharding, collectives: StepCollectives) -> str:
    sent = collectives.sent(sharding)
    each = f"each rank sends up to {sent.inside:.3g} x the weights"
    if sharding.nodes == 1:
        return each
    return f"{each} inside its node, and each node {sent.between:.3g} x the weights to others"


def _times(number: int) -> str:
    return {1: "once", 2: "twice"}.get(number, f"{number:,} times")
