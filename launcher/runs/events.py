"""What happened to a run, on the clock: events.jsonl in the run folder, a line each.

began      its ranks have met: step, ranks, nodes, strategy, device_name, and job in Slurm
counted    flops_per_sample: the operations of a forward pass
stopped    it was asked to stop, and has saved: step
failed     what failure.json said, put here when it was begun again: error, message, rank, node
finished   step

Rank 0 alone writes it, and adds to it only: a run that goes on from a checkpoint takes its numbers
back to there, and not what happened.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from launcher.runs.rundir import RunDir, read_failure, read_rows


def record_event(run_dir: RunDir, event: str, **values: Any) -> None:
    """Add what happened now, or at the `time` that is given. A full disk loses it, and no more."""
    line = json.dumps({"time": time.time(), "event": event} | values) + "\n"
    with contextlib.suppress(OSError), run_dir.events.open("a", encoding="utf-8") as file:
        file.write(line)


def record_past_failure(run_dir: RunDir) -> None:
    """Move what failure.json says, if it is there, to the events."""
    failure = read_failure(run_dir)
    if failure is None:
        return
    names = "time", "rank", "node", "error", "message"
    record_event(run_dir, "failed", **{name: failure.get(name) for name in names})
    run_dir.failure.unlink(missing_ok=True)


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the events, in the order in which they were written."""
    return [row for row in read_rows(run_dir.events) if "event" in row and "time" in row]
