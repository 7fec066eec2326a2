"""Ranks keep to the CPUs near their GPUs."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from torch._C._distributed_c10d import HashStore

from launcher.engine.ranks import cpu_binding
from launcher.engine.ranks.cpu_binding import bind_to_gpu, keep_to_cpus
from launcher.environment.numa import (
    CpuBinding,
    choose_cpus,
    cpu_ranges,
    numa_node_of,
    read_numa_nodes,
)
from launcher.environment.world import World

NODES = {0: frozenset(range(8)), 1: frozenset(range(8, 16))}


def machine(root: Path, cpus: dict[int, str], gpus: dict[str, str]) -> Path:
    """Write the files of NUMA nodes, by CPUs, and of GPUs, by node; return the root."""
    for node, text in cpus.items():
        folder = root / f"sys/devices/system/node/node{node}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{text}\n")
    for address, node_text in gpus.items():
        folder = root / "sys/bus/pci/devices" / address
        folder.mkdir(parents=True)
        (folder / "numa_node").write_text(f"{node_text}\n")
    return root


def test_numa_nodes_are_read(tmp_path: Path) -> None:
    """Nodes with CPUs are read from /sys; memory without CPUs, and devices without a node, not."""
    cpus = {0: "0-3,8-11", 1: "4-7", 2: "", 10: "12"}
    root = machine(tmp_path, cpus, {"0000:3b:00.0": "1", "0000:5e:00.0": "-1"})
    nodes = read_numa_nodes(root)
    assert list(nodes) == [0, 1, 10]
    assert nodes[0] == {0, 1, 2, 3, 8, 9, 10, 11}
    assert [cpu_ranges(node) for node in nodes.values()] == ["0-3,8-11", "4-7", "12"]
    assert numa_node_of("0000:3b:00.0", root) == 1
    assert numa_node_of("0000:5e:00.0", root) is None
    assert numa_node_of("0000:ff:00.0", root) is None
    assert read_numa_nodes(tmp_path / "none") == {}


Case = tuple[int | None, list[int | None], dict[int, frozenset[int]], set[int], int, str]

EVERY = set(range(16))
CASES: dict[str, Case] = {
    "two ranks on each node": (1, [0, 0, 1, 1], NODES, EVERY, 3, "8-15"),
    "all GPUs on one node": (0, [0, 0], NODES, EVERY, 3, "0-7"),
    "a cgroup": (0, [0, 1], NODES, {2, 3, 12}, 0, "2-3"),
    "few CPUs, evenly spread": (0, [0, 0, 1, 1], NODES, {0, 1, 8, 9}, 4, "0-1"),
    "CPUs of the rank alone": (1, [0, 0, 1, 1], NODES, {8, 9}, 4, "8-9"),
    "one node": (0, [0], {0: NODES[0]}, EVERY, 0, ""),
    "an unknown node": (None, [None, 1], NODES, EVERY, 0, ""),
    "a node without CPUs": (2, [2], NODES, EVERY, 0, ""),
    "only CPUs of another node": (1, [1], NODES, set(range(8)), 0, ""),
    "too few CPUs near the GPU": (1, [0, 1], NODES, {0, 1, 2, 3, 4, 5, 6, 8}, 3, ""),
}


@pytest.mark.parametrize("name", CASES)
def test_a_rank_keeps_to_the_allowed_cpus_near_its_gpu(name: str) -> None:
    """The ranks of a NUMA node share its allowed CPUs; where they are too few, none is bound."""
    own, ranks, nodes, allowed, workers, cpus = CASES[name]
    binding = choose_cpus(own, ranks, nodes, allowed, workers_per_rank=workers)
    assert cpu_ranges(binding.cpus) == cpus
    assert bool(binding.reason) != bool(binding.cpus)
    is_fault = name.startswith(("only CPUs", "too few"))
    assert binding.is_refused == is_fault


def in_child(function: Callable[[], Any]) -> Any:
    """Return what a function returns in a forked process, as JSON can express it."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writer, json.dumps(function()).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        text = pipe.read()
    os.waitpid(child, 0)
    return json.loads(text)


needs_cpus = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two CPUs")


@needs_cpus
def test_threads_and_workers_inherit_the_binding() -> None:
    """Threads that run already are bound as well, and so is a process that is forked later."""
    last = max(os.sched_getaffinity(0))

    def bind() -> list[list[int]]:
        started, stop = threading.Event(), threading.Event()

        def wait() -> None:
            started.set()
            stop.wait()

        thread = threading.Thread(target=wait)
        thread.start()
        started.wait()
        assert thread.native_id is not None
        keep_to_cpus({last})
        worker = in_child(lambda: sorted(os.sched_getaffinity(0)))
        affinities = [sorted(os.sched_getaffinity(task)) for task in (0, thread.native_id)]
        stop.set()
        return [*affinities, worker]

    assert in_child(bind) == [[last]] * 3


@needs_cpus
def test_ranks_learn_from_each_other_who_shares_their_node(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each rank of a machine gets the CPUs of its own GPU's node; ranks elsewhere do not count."""
    cpus = {0: "0-7", 1: "8-15"}
    gpus = {f"0000:0{rank}:00.0": str(rank // 2) for rank in range(4)}
    root = machine(tmp_path, cpus, gpus)
    bound: list[str] = []
    monkeypatch.setattr(cpu_binding, "allowed_cpus", lambda: frozenset(range(16)))
    monkeypatch.setattr(cpu_binding, "keep_to_cpus", lambda cpus: bound.append(cpu_ranges(cpus)))
    store = HashStore()

    def bind(rank: int) -> CpuBinding | None:
        world = World(rank=4 + rank, world_size=8, local_rank=rank, local_world_size=4)
        address = f"0000:0{rank}:00.0"
        wanted = rank != 3
        return bind_to_gpu(address, world, store, workers_per_rank=3, wanted=wanted, root=root)

    with ThreadPoolExecutor(4) as pool:
        bindings = list(pool.map(bind, range(4)))
    assert bindings[3] is None
    assert sorted(bound) == ["0-7", "0-7", "8-15"]
    assert [cpu_ranges(b.cpus) for b in bindings[:3] if b] == ["0-7", "0-7", "8-15"]


def test_a_kernel_that_refuses_leaves_the_rank_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """CPUs that do not exist on this machine are refused by the kernel, and the rank goes on."""
    root = machine(tmp_path, {0: "0-1", 1: "4000"}, {"0000:01:00.0": "1"})
    before = os.sched_getaffinity(0)
    monkeypatch.setattr(cpu_binding, "allowed_cpus", lambda: frozenset(range(4001)))
    binding = bind_to_gpu("0000:01:00.0", World(), None, workers_per_rank=0, root=root)
    assert binding is not None
    assert binding.is_refused
    assert "kernel refuses" in binding.reason
    assert os.sched_getaffinity(0) == before
