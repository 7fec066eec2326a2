"""The text of a search for a strategy: all combinations, the trials, and the settings to paste."""

from __future__ import annotations

import textwrap

from launcher.analysis.strategy_choice import StrategyCandidate, StrategyTrial
from launcher.console.tables import table
from launcher.quantities import size
from launcher.tuning.strategy_search import StrategySearchResult
from launcher.tuning.summaries import recommendation

_ORDER = (
    "Planned memory of a rank, and what it sends in a step. Combinations that fit come first, the "
    "cheapest before the others: offloading costs most, then checkpointing, then what is sent."
)

_HEAD = [
    "strategy",
    "offload",
    "checkpointing",
    "micro-batch",
    "micro-steps",
    "memory",
    "node's host",
    "sent",
    "",
]


def strategy_trial_text(trial: StrategyTrial) -> str:
    """Return the outcome of a trial, in one line."""
    if trial.peak_bytes is None or trial.samples_per_second is None:
        return f"  {trial.candidate.title}  out of memory"
    verdict = "" if trial.fits else ", more than the limit"
    planned = size(trial.candidate.planned_training_bytes)
    return (
        f"  {trial.candidate.title}  {trial.samples_per_second:,.0f} samples/s  measured "
        f"{size(trial.peak_bytes)} per rank{verdict}, planned {planned}"
    )


def strategy_text(result: StrategySearchResult) -> str:
    """Return all combinations with their memory, and the recommended settings."""
    limit = "unknown" if result.limit_bytes is None else size(result.limit_bytes)
    lines = [
        f"The model has {result.num_values:,} weights.",
        f"The memory limit of a rank is {limit}.",
        "",
        *textwrap.wrap(_ORDER, 96),
        "",
        *table([_HEAD, *map(_cells, result.candidates)], "<<<>>>>>"),
        "",
        *result.notes,
    ]
    chosen = result.chosen
    if not result.candidates:
        lines.append("None of the strategies can train the recipe on these ranks.")
    elif chosen is None:
        smallest = min(result.candidates, key=lambda candidate: candidate.planned_bytes)
        lines.append(
            f"No combination fits: the smallest needs {size(smallest.planned_bytes)} per rank "
            f"({smallest.title}). Use more ranks, or a smaller model."
        )
    elif not result.settings:
        lines.append(f"The plan is the {_superlative(result)} combination that fits.")
    else:
        lines.append(recommendation(_written(result), f"launcher find strategy: {_why(result)}"))
    return "\n".join(lines)


def _superlative(result: StrategySearchResult) -> str:
    return "fastest measured" if result.trials else "cheapest"


def _written(result: StrategySearchResult) -> dict[str, str]:
    return {
        name: "none" if value is None else str(value).lower()
        for name, value in result.settings.items()
    }


def _why(result: StrategySearchResult) -> str:
    """Return the evidence for the recommended settings."""
    for trial in result.trials:
        if trial.candidate == result.chosen and trial.peak_bytes is not None:
            return f"{size(trial.peak_bytes)} per rank, {trial.samples_per_second:,.0f} samples/s"
    assert result.chosen is not None
    return f"{size(result.chosen.planned_bytes)} per rank, as planned"


def _cells(candidate: StrategyCandidate) -> list[str]:
    return [
        candidate.strategy if candidate.shard is None else f"fsdp shard={candidate.shard}",
        "cpu" if candidate.offload else "-",
        "yes" if candidate.activation_checkpointing else "-",
        f"{candidate.micro_batch_size:,}",
        f"{candidate.accumulation_steps:,}",
        size(candidate.planned_bytes),
        size(candidate.planned_host_bytes),
        size(candidate.sent_bytes),
        "fits" if candidate.fits else "",
    ]
