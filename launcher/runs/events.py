"""events.jsonl: when a run began, stopped, failed and finished, one JSON object per line.

Every event has `time`, in seconds since 1970, and `event`:

began      the ranks have met: step, ranks, nodes, strategy, device_name; in Slurm also job
counted    flops_per_sample: the operations of a forward pass
stopped    the run was asked to stop and has saved a checkpoint: step
failed     the content of failure.json, moved here when the run starts again: error, message,
           rank, node; rank is null if failure.json was damaged
finished   step

Rank 0 alone writes the file and only appends to it. A run that resumes from a checkpoint discards
later lines of metrics.jsonl, but keeps its events.
"""

from __future__ import annotations

import contextlib
import json
import time
from typing import Any

from launcher.errors import RunDirError
from launcher.runs.failure_record import read_failure
from launcher.runs.rundir import RunDir, read_rows


def record_event(run_dir: RunDir, event: str, **values: Any) -> None:
    """Append an event; on a full disk the event is lost and the run continues.

    Args:
        run_dir: The run folder.
        event: Name of the event.
        **values: Values of the event; `time` replaces the present time.
    """
    line = json.dumps({"time": time.time(), "event": event} | values) + "\n"
    with contextlib.suppress(OSError), run_dir.events.open("a", encoding="utf-8") as file:
        file.write(line)


def record_past_failure(run_dir: RunDir) -> None:
    """Move the content of failure.json, if it exists, to the events.

    A damaged failure.json is moved as well, with the damage as the message, so that it does not
    keep a run from resuming.
    """
    try:
        failure = read_failure(run_dir)
        if failure is None:
            return
        names = "time", "rank", "node", "error", "message"
        values = {name: getattr(failure, name) for name in names}
    except RunDirError as error:
        values = {"rank": None, "node": "", "error": type(error).__name__, "message": str(error)}
        with contextlib.suppress(OSError):
            values["time"] = run_dir.failure.stat().st_mtime
    record_event(run_dir, "failed", **values)
    run_dir.failure.unlink(missing_ok=True)


def read_events(run_dir: RunDir) -> list[dict[str, Any]]:
    """Return the events in the order in which they were written; skip damaged lines."""
    return [row for row in read_rows(run_dir.events) if "event" in row and "time" in row]
