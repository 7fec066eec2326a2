"""The collective calls of ranks, in real records of two ranks and in synthetic ones."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch._C._distributed_c10d import FileStore

from launcher.engine.ranks.flight_recorder import record_collectives, recorder_function
from launcher.runs.collectives import (
    Call,
    Collectives,
    Status,
    find_missing_call,
    read_collectives,
)
from launcher.runs.rundir import RunDir


def calls(enqueued: int, started: int = -1, *, group: str = "0") -> Collectives:
    """Return the record of a rank that has made some calls."""
    entries = [
        Call(
            pg_id=int(group),
            collective_seq_id=number,
            profiling_name="nccl:all_reduce",
            input_sizes=[[number, 2]],
            input_dtypes=["Float"],
        )
        for number in range(1, enqueued + 1)
    ]
    status = Status(last_enqueued_collective=str(enqueued), last_started_collective=str(started))
    return Collectives(entries=entries, pg_status={group: status})


def _take_part(rank: int, folder: Path) -> None:
    """Make three collective calls, on rank 0 a fourth, and write the record of the calls."""
    store = FileStore(str(folder / "store"), 2)
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timeout)
    for _ in range(3):
        dist.all_reduce(torch.ones(2))
    if rank == 0:
        dist.all_reduce(torch.ones(7), async_op=True)
    record_collectives(RunDir(folder).collectives(rank))
    store.set(f"done{rank}", "")
    store.get(f"done{1 - rank}")


def test_a_call_that_a_rank_does_not_make_is_found(tmp_path: Path) -> None:
    """Of two gloo ranks, the one that makes one call less is named with the other's call."""
    (tmp_path / "health").mkdir()
    children = []
    for rank in range(2):
        if (child := os.fork()) == 0:
            try:
                _take_part(rank, tmp_path)
            finally:
                os._exit(0)
        children.append(child)
    for child in children:
        os.waitpid(child, 0)
    found = find_missing_call([read_collectives(RunDir(tmp_path), rank) for rank in range(2)])
    assert found is not None
    assert found[0] == 1
    assert "call 4 (gloo:all_reduce of Float[7])" in found[1]


@pytest.mark.parametrize(
    ("ranks", "slowest", "fragment"),
    [
        ([calls(5), calls(4), calls(5)], 1, "has not made collective call 5 (nccl:all_reduce"),
        (
            [calls(5, 5), calls(5, 5), calls(5, 4)],
            2,
            "queued and not started collective call 5",
        ),
        ([calls(5), None, calls(4)], 2, "call 5"),
    ],
)
def test_the_slowest_rank_is_named(
    ranks: list[Collectives | None], slowest: int, fragment: str
) -> None:
    """The rank that has called or started the fewest collectives is named."""
    found = find_missing_call(ranks)
    assert found is not None
    assert found[0] == slowest
    assert fragment in found[1]


@pytest.mark.parametrize(
    "ranks",
    [
        [calls(5), calls(5)],
        [calls(5), None],
        [None, None],
        [Collectives(), calls(3)],
        [calls(5, group="1"), calls(4, group="2")],
    ],
)
def test_equal_ranks_are_not_blamed(ranks: list[Collectives | None]) -> None:
    """No rank is named if the ranks are equally far, or share no process group."""
    assert find_missing_call(ranks) is None


@pytest.mark.parametrize(
    ("backend", "function"),
    [
        ("gloo", "_dump_fr_trace_json"),
        ("nccl", "_dump_nccl_trace_json"),
        ("cuda:nccl,cpu:gloo", "_dump_nccl_trace_json"),
    ],
)
def test_calls_of_nccl_are_in_its_own_recorder(backend: str, function: str) -> None:
    """Groups with NCCL, alone or beside gloo, are read from the flight recorder of NCCL."""
    config = dist.distributed_c10d.BackendConfig(dist.Backend(backend))
    assert recorder_function(str(config)) == function


def test_a_damaged_record_is_ignored(tmp_path: Path) -> None:
    """A record that is not JSON of the expected types counts as missing."""
    (tmp_path / "health").mkdir()
    path = RunDir(tmp_path).collectives(0)
    assert read_collectives(RunDir(tmp_path), 0) is None
    for text in ("{", '{"pg_status": {"0": 5}}', '{"entries": [{"pg_id": "x"}]}'):
        path.write_text(text)
        assert read_collectives(RunDir(tmp_path), 0) is None
    path.write_text('{"pg_status": {"0": {"last_enqueued_collective": "x"}}}')
    assert read_collectives(RunDir(tmp_path), 0) is not None
