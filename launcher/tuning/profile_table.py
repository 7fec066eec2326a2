"""The text of a profile: a table of the ranks, the longest operations, and advice."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.analysis.step_profile import PARTS, Profile, advice
from launcher.console.tables import table
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

_MAX_RANKS = 16
_MAX_NAME_LENGTH = 60


def profile_text(profiles: Sequence[Profile], plan: Plan, run_dir: RunDir) -> str:
    """Return the profile as text.

    If there are many ranks, the table shows those that wait least for others, because the others
    wait for them.

    Args:
        profiles: Profile of each rank.
        plan: The plan of the profiled run.
        run_dir: Folder of the traces.
    """
    rows = [["rank", "ms/step", *PARTS]]
    ranks = list(enumerate(profiles))
    if len(ranks) > _MAX_RANKS:
        ranks.sort(key=lambda item: item[1].parts["communication"])
    for rank, profile in ranks[:_MAX_RANKS]:
        rows.append([str(rank), *_cells(profile)])
    if len(profiles) > 1:
        rows.append(["mean", *_cells(_mean(profiles))])
    lines = table(rows, ">" * len(rows[0]))
    if len(ranks) > _MAX_RANKS:
        num_hidden = len(ranks) - _MAX_RANKS
        lines.append(f"{num_hidden} more ranks, which wait longer for others, are not shown.")
    first = profiles[0]
    lines += ["", f"The longest operations of rank 0, per step, averaged over {first.steps} steps:"]
    operations = [
        [f"{1e3 * seconds:.3g} ms", name[:_MAX_NAME_LENGTH]] for name, seconds in first.operations
    ]
    lines += [f"  {line}" for line in table(operations, "><")] if operations else ["  none"]
    lines += ["", *advice(profiles, plan)]
    lines += ["", f"traces: {run_dir.shown}/traces (open them in https://ui.perfetto.dev)"]
    return "\n".join(lines)


def _cells(profile: Profile) -> list[str]:
    step = profile.step_seconds
    shares = [f"{profile.parts[part] / step:.0%}" for part in PARTS]
    return [f"{1e3 * step:.3g}", *shares]


def _mean(profiles: Sequence[Profile]) -> Profile:
    count = len(profiles)
    return Profile(
        steps=profiles[0].steps,
        step_seconds=sum(profile.step_seconds for profile in profiles) / count,
        parts={part: sum(profile.parts[part] for profile in profiles) / count for part in PARTS},
        operations=[],
    )
