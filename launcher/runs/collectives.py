"""health/collectives<N>.json: the collective calls of a rank, written when a run hangs.

PyTorch's flight recorder numbers the collective calls of each process group on every rank. The rank
with the lowest numbers is the one for which the others wait, also where all ranks wait in the same
line of Python, as they do for a GPU.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from msgspec import Struct, field

from launcher.errors import RunDirError
from launcher.json_file import find_json
from launcher.printable import printable_line, shortened
from launcher.runs.rundir import RunDir

_MAX_BYTES = 1 << 25


class Status(Struct, frozen=True, kw_only=True):
    """How far a rank is in a process group; -1 stands for none, and where it is not recorded.

    torch writes the numbers as text.
    """

    last_enqueued_collective: int | str = -1
    last_started_collective: int | str = -1

    @property
    def position(self) -> tuple[int, int]:
        """The numbers of the last call that was queued, and of the last one that was started."""
        return _number(self.last_enqueued_collective), _number(self.last_started_collective)


class Call(Struct, frozen=True, kw_only=True):
    """A collective call of a rank."""

    pg_id: int
    """Number of the process group."""

    collective_seq_id: int
    """Number of the call in its group, from 1."""

    process_group: list[str] = field(default_factory=list)
    """Name and description of the group."""

    profiling_name: str = ""
    """Library and operation, such as `nccl:all_reduce`."""

    input_sizes: list[list[int]] = field(default_factory=list)
    """Shapes of the inputs."""

    input_dtypes: list[str] = field(default_factory=list)
    """Data types of the inputs."""

    @property
    def text(self) -> str:
        """The operation with its inputs, such as `nccl:all_reduce of Float[7]`."""
        inputs = ", ".join(
            f"{dtype}{size}"
            for dtype, size in zip(self.input_dtypes, self.input_sizes, strict=False)
        )
        return printable_line(shortened(f"{self.profiling_name} of {inputs}", 200))


class Collectives(Struct, frozen=True, kw_only=True):
    """The collective calls of a rank, as `torch._C._distributed_c10d._dump_fr_trace_json` has them.

    Unknown keys are ignored.
    """

    entries: list[Call] = field(default_factory=list)
    """The last calls, in their order."""

    pg_status: dict[str, Status] = field(default_factory=dict)
    """How far the rank is, by the number of the process group."""


def read_collectives(run_dir: RunDir, rank: int) -> Collectives | None:
    """Return the collective calls of a rank, or None if they were not written or are damaged."""
    with contextlib.suppress(RunDirError):
        return find_json(run_dir.collectives(rank), Collectives, max_bytes=_MAX_BYTES)
    return None


def find_missing_call(ranks: Sequence[Collectives | None]) -> tuple[int, str] | None:
    """Return the rank for which others wait in a collective call, with what they wait for.

    Args:
        ranks: The calls of each rank, in the order of ranks; None where they are unknown.

    Returns:
        The rank and a clause about it; None if no rank is behind another.
    """
    for group in sorted({group for calls in ranks if calls for group in calls.pg_status}):
        positions = {
            rank: status.position
            for rank, calls in enumerate(ranks)
            if calls is not None and (status := calls.pg_status.get(group)) is not None
        }
        if len(set(positions.values())) < 2:
            continue
        slowest = min(positions, key=positions.__getitem__)
        fastest = max(positions, key=positions.__getitem__)
        called, is_called = positions[slowest][0], positions[slowest][0] == positions[fastest][0]
        number = called if is_called else called + 1
        call = next(_calls(ranks[fastest], group, number), None)
        what = f"collective call {number:,}" + (f" ({call.text})" if call is not None else "")
        verb = "has queued and not started" if is_called else "has not made"
        return slowest, f"rank {slowest} {verb} {what}, in which rank {fastest} waits"
    return None


def _number(value: int | str) -> int:
    try:
        return int(value)
    except ValueError:
        return -1


def _calls(calls: Collectives | None, group: str, number: int) -> Iterator[Call]:
    for call in calls.entries if calls is not None else ():
        if str(call.pg_id) == group and call.collective_seq_id == number:
            yield call
