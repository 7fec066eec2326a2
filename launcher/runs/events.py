"""events.jsonl: when a run began, saved, stopped, failed and finished, one JSON object per line.

Every event has `time`, in seconds since 1970, and `event`:

began      the ranks have met: step, ranks, nodes, strategy, device_name; in Slurm also job
counted    flops_per_sample: the operations of a forward pass
timed      max_time has set the steps: step, steps, limit, max_time, seconds_per_step, used_seconds
saved      a checkpoint is complete: step, place (`run folder`, or `quick` for one on the nodes),
           stall_seconds, write_seconds, seconds, num_bytes
promoted   a quick checkpoint has been copied from the nodes to the run folder: step, seconds
stopped    the run was asked to stop and has saved a checkpoint: step
failed     the content of failure.json, moved here when the run starts again: error, message,
           rank, node; rank is null if failure.json was damaged
recovered  the launchers of several nodes have started the ranks again, and the first step is taken:
           step, seconds since the loss was noticed, node and cause (rank, node, health or joined)
           of the loss, nodes that go on
finished   step

Rank 0 alone writes the file, or its launcher between two attempts, and only appends to it. A run
that resumes from a checkpoint discards later lines of metrics.jsonl, but keeps its events.
"""

from __future__ import annotations

import contextlib
import time
from typing import Any

import msgspec
from msgspec import Struct

from launcher.errors import RunDirError
from launcher.json_file import Count, Moment, encode_json, read_lines
from launcher.printable import printable
from launcher.regular_file import open_to_append
from launcher.runs.failure_record import read_failure
from launcher.runs.files import remove_file
from launcher.runs.job import Loss
from launcher.runs.rundir import RunDir

RUN_FOLDER, QUICK = "run folder", "quick"
"""The places of checkpoints; quick ones are on the nodes."""


class _Event(Struct, tag_field="event", frozen=True, kw_only=True):
    """One line of events.jsonl."""

    time: Moment
    """When it happened, in seconds since 1970."""


class Began(_Event, tag="began", frozen=True, kw_only=True):
    """The ranks have met."""

    step: Count
    """Steps taken before."""

    ranks: Count
    """Number of ranks."""

    nodes: Count = 1
    """Number of nodes."""

    strategy: str = ""
    """The strategy of the plan."""

    device_name: str | None = None
    """Name of the device of rank 0; None if unknown."""

    job: str | int | None = None
    """Slurm job id; None outside Slurm."""


class Counted(_Event, tag="counted", frozen=True, kw_only=True):
    """The operations of the model have been counted."""

    flops_per_sample: float
    """Operations of a forward pass with one sample."""


class Timed(_Event, tag="timed", frozen=True, kw_only=True):
    """`max_time` has set the number of steps, from the speed of the first ones."""

    step: Count
    """Steps taken while the speed was measured."""

    steps: Count
    """Steps of the run."""

    limit: Count
    """Upper limit, from the recipe's epochs or steps."""

    max_time: str
    """The setting, such as 30min."""

    seconds_per_step: float = 0.0
    """Measured duration of a step."""

    used_seconds: float = 0.0
    """Time since the start of the command."""


class Saved(_Event, tag="saved", frozen=True, kw_only=True):
    """A checkpoint is complete."""

    step: Count
    """Steps taken before it."""

    place: str = RUN_FOLDER
    """Where it is: `run folder`, or `quick` for a quick checkpoint on the nodes."""

    stall_seconds: float = 0.0
    """Time that the training waited for the copies, on rank 0."""

    write_seconds: float = 0.0
    """Time that the slowest rank took to write its files."""

    seconds: float = 0.0
    """Time from the end of the stall until it was complete, as a step found."""

    num_bytes: Count = 0
    """Bytes that all ranks wrote."""

    @property
    def bytes_per_second(self) -> float | None:
        """Bandwidth of writing; None if it is unknown."""
        return self.num_bytes / self.write_seconds if self.write_seconds > 0 else None


class Promoted(_Event, tag="promoted", frozen=True, kw_only=True):
    """A quick checkpoint has been copied from the nodes to the run folder."""

    step: Count
    """Steps taken before it."""

    seconds: float = 0.0
    """Time that it took to find, copy and verify it."""


class Stopped(_Event, tag="stopped", frozen=True, kw_only=True):
    """The run was asked to stop and has saved a checkpoint."""

    step: Count
    """Steps taken."""


class Failed(_Event, tag="failed", frozen=True, kw_only=True):
    """The run failed, and has been started again since."""

    rank: int | None = None
    """The rank that failed first; None if failure.json was damaged."""

    node: str = ""
    """Name of the rank's node."""

    error: str = ""
    """Class of the exception."""

    message: str = ""
    """Text of the exception."""


class Recovered(_Event, tag="recovered", frozen=True, kw_only=True):
    """After a restart on several nodes, the ranks have taken their first step."""

    step: Count
    """Steps taken, the first one after the restart included."""

    seconds: float
    """Time since the launchers noticed the loss."""

    node: str = ""
    """Name of the node that was lost, failed or joined."""

    cause: str = ""
    """`rank`, `node`, `health` or `joined`."""

    nodes: Count = 1
    """Number of nodes that go on."""


class Finished(_Event, tag="finished", frozen=True, kw_only=True):
    """The run took all of its steps."""

    step: Count
    """Steps taken."""


Event = Began | Counted | Timed | Saved | Promoted | Stopped | Failed | Recovered | Finished
"""A line of events.jsonl. Unknown keys of a line are ignored; a line of another kind is skipped."""

_DECODER: msgspec.json.Decoder[Event] = msgspec.json.Decoder(Event)


def record_event(run_dir: RunDir, event: str, **values: Any) -> None:
    """Append an event; on a full disk the event is lost and the run continues.

    Args:
        run_dir: The run folder.
        event: Name of the event.
        **values: Values of the event; `time` replaces the present time.
    """
    line = encode_json({"time": time.time(), "event": event} | values) + "\n"
    with contextlib.suppress(OSError), open_to_append(run_dir.events) as file:
        file.write(line.encode())


def record_past_failure(run_dir: RunDir) -> None:
    """Move the content of failure.json, if it exists, to the events.

    A damaged failure.json is moved as well, with the damage as the message, so that it does not
    keep a run from resuming.

    Raises:
        RunDirError: failure.json cannot be removed.
    """
    try:
        failure = read_failure(run_dir)
        if failure is None:
            return
        names = "time", "rank", "node", "error", "message"
        values = {name: getattr(failure, name) for name in names}
        values["message"] = printable(failure.message)
    except RunDirError as error:
        values = {"rank": None, "node": "", "error": type(error).__name__, "message": str(error)}
        with contextlib.suppress(OSError):
            values["time"] = run_dir.failure.lstat().st_mtime
    record_event(run_dir, "failed", **values)
    remove_file(run_dir.failure)


def record_loss(run_dir: RunDir, loss: Loss, rank: int) -> None:
    """Record how the attempt before ended, between two attempts of a run on several nodes.

    Args:
        run_dir: The run folder.
        loss: Why the ranks are started again.
        rank: The first rank of the lost node.

    Raises:
        RunDirError: failure.json cannot be removed.
    """
    if loss.cause != "node":
        record_past_failure(run_dir)
        return
    remove_file(run_dir.failure)  # of ranks that the lost node was connected to
    values = {"time": loss.time, "rank": rank, "node": loss.node, "error": "LostNode"}
    record_event(run_dir, "failed", **values, message=f"{loss.node} has disappeared")


def read_events(run_dir: RunDir) -> list[Event]:
    """Return the events in the order in which they were written; skip damaged lines."""
    return read_lines(run_dir.events, _DECODER)
