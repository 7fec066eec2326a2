"""The text of a memory plan: the planned strategy by kind of memory, and all others beside it."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable

from launcher.console.tables import table
from launcher.planning.memory import ESTIMATED, KINDS, MemoryKind, PlaceMemory, RankMemory
from launcher.quantities import size
from launcher.tuning.memory_plan import MemoryPlan

_WIDTH = 96

_SHOWN_KINDS: tuple[tuple[str, tuple[MemoryKind, ...]], ...] = (
    ("weights", ("weights", "fp32 copies")),
    ("grads", ("gradients", "sums of the tree")),
    ("state", ("optimizer state", "averaged weights")),
    ("gathered", ("gathered weights", "weights cast by autocast")),
    ("buffers", ("buffers of communication",)),
    ("activations", ("activations",)),
)
"""Columns of the comparison, and the kinds that each adds up."""

_NOT_COUNTED = (
    "Not counted: the CUDA context and the buffers of NCCL, about 1 GiB on each GPU, and what the "
    "allocator loses to fragmentation."
)


def memory_text(memory: MemoryPlan) -> str:
    """Return the memory plan as text."""
    planned = memory.planned
    on_gpu = planned.layout.device == "cuda"
    model = memory.model
    title = (
        f"Memory per rank of a model with {model.num_values:,} weights, {model.num_trained:,} of "
        f"them trained, under strategy={planned.layout.title}:"
    )
    lines = [*_wrap([title]), "", *_details(planned, on_gpu=on_gpu), ""]
    lines += [*_wrap([_note_on_peak(planned)]), "", *_comparison(memory, on_gpu=on_gpu), ""]
    notes = [*model.notes, *([_NOT_COUNTED] if on_gpu else ())]
    return "\n".join([*lines, *_wrap(notes)]).rstrip()


def _details(planned: RankMemory, *, on_gpu: bool) -> list[str]:
    """Return a table of the planned strategy by kind."""
    places = (planned.device, planned.host) if on_gpu else (planned.host,)
    rows = [["", *(("on the GPU", "on the host") if on_gpu else ("bytes",))]]
    for kind in KINDS:
        if any(kind in place.bytes_by_kind for place in places):
            name = f"{kind} (estimated)" if kind in ESTIMATED else kind
            rows.append([name, *(_cell(place.bytes_by_kind.get(kind, 0)) for place in places)])
    rows.append(["largest sum at any time", *(_cell(place.peak) for place in places)])
    return table(rows, "<>>")


def _comparison(memory: MemoryPlan, *, on_gpu: bool) -> list[str]:
    """Return a table of all strategies; a star marks the planned one.

    The last column is the host memory of all ranks of a node.
    """
    head = ["  strategy", *(name for name, _ in _SHOWN_KINDS)]
    rows = [[*head, *(("GPU", "host") if on_gpu else ("peak",)), "node"]]
    for other in memory.alternatives:
        mark = "*" if other.layout == memory.planned.layout else " "
        name = f"{mark} {other.layout.title.replace('offload=cpu', 'offload')}"
        cells = [_cell(_sum(other.place, kinds)) for _, kinds in _SHOWN_KINDS]
        totals = [_cell(other.place.peak), *([_cell(other.host.peak)] if on_gpu else ())]
        rows.append([name, *cells, *totals, _cell(other.node_host_bytes)])
    return table(rows, "<" + ">" * (len(rows[0]) - 1))


def _sum(place: PlaceMemory, kinds: Iterable[MemoryKind]) -> int:
    return sum(place.bytes_by_kind.get(kind, 0) for kind in kinds)


def _note_on_peak(planned: RankMemory) -> str:
    if planned.layout.accumulates:
        return "The largest sum is smaller than the sum of all: not all exist at the same time."
    return (
        "The largest sum is smaller than the sum of all: activations are freed while backward "
        "computes gradients, and neither exist while a checkpoint is copied."
    )


def _cell(num_bytes: int) -> str:
    return size(num_bytes) if num_bytes else "-"


def _wrap(sentences: Iterable[str]) -> list[str]:
    return [
        line
        for sentence in sentences
        for line in textwrap.wrap(sentence, _WIDTH, break_long_words=False, break_on_hyphens=False)
    ]
