"""Where the time of a step went, as a table, and what to try."""

from __future__ import annotations

from collections.abc import Sequence

from launcher.analysis.step_profile import PARTS, Profile, advice
from launcher.console.tables import table
from launcher.planning.plan import Plan
from launcher.runs.rundir import RunDir

_MOST_RANKS = 16
_NAME = 60


def profile_text(profiles: Sequence[Profile], plan: Plan, run_dir: RunDir) -> str:
    """Return the table of all ranks, the operations that take the longest, and advice."""
    rows = [["rank", "ms a step", *PARTS]]
    shown = list(enumerate(profiles))
    if len(shown) > _MOST_RANKS:
        shown.sort(key=lambda each: each[1].parts["communication"])  # those that others wait for
    for rank, each in shown[:_MOST_RANKS]:
        rows.append([str(rank), *_cells(each)])
    if len(profiles) > 1:
        rows.append(["mean", *_cells(_mean(profiles))])
    lines = table(rows, ">" * len(rows[0]))
    if len(shown) > _MOST_RANKS:
        lines.append(f"and {len(shown) - _MOST_RANKS} ranks more, which wait longer for others")
    first = profiles[0]
    lines += ["", f"what takes the longest on rank 0, over {first.steps} steps:"]
    longest = [[f"{1e3 * value:.3g} ms", name[:_NAME]] for name, value in first.operations]
    lines += [f"  {line}" for line in table(longest, "><")] if longest else ["  nothing"]
    lines += ["", *advice(profiles, plan)]
    lines += ["", f"traces: {run_dir.shown}/traces (for https://ui.perfetto.dev)"]
    return "\n".join(lines)


def _cells(profile: Profile) -> list[str]:
    whole = profile.step_seconds
    shares = [f"{profile.parts[part] / whole:.0%}" for part in PARTS]
    return [f"{1e3 * whole:.3g}", *shares]


def _mean(profiles: Sequence[Profile]) -> Profile:
    count = len(profiles)
    return Profile(
        steps=profiles[0].steps,
        step_seconds=sum(each.step_seconds for each in profiles) / count,
        parts={part: sum(each.parts[part] for each in profiles) / count for part in PARTS},
        operations=[],
    )
