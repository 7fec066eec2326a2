"""The time of a step by its parts, from a trace of torch.profiler, with advice.

A trace is a file that `export_chrome_trace` writes. Every instant of the profiled steps belongs to
the first of these that applies:

1. If a kernel or an operation computes, the part of the step that Python was in when it was
   launched. Autograd launches the kernels of the backward pass from a thread of its own; the
   correlation id in the trace leads from a kernel to its launch.
2. If only a collective runs, communication.
3. On CPUs, the part of the step that Python executes. On a GPU, which is then idle, data if Python
   waits for data.
4. Otherwise, other.
"""

from __future__ import annotations

import bisect
import gzip
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
"""The parts of a step, in their order."""

PREFIX = "launcher::"
"""Prefix of the names of the ranges in a trace that mark the parts of a step."""

_STEP_PREFIX = "ProfilerStep#"
_KERNEL_CATEGORIES = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_LAUNCH_CATEGORIES = frozenset(("cuda_runtime", "cuda_driver"))
_COLLECTIVE_PREFIXES = ("gloo:", "nccl", "c10d::", "c10d_functional::", "_c10d_functional::")
_LARGE_SHARE = 0.1
"""Fraction of a step from which data and communication merit advice; other parts merit it from
twice that."""

_MAX_OPERATIONS = 8
_STRAGGLER_RATIO = 1.15
"""A rank whose own work exceeds this many times the median of the others is a straggler."""

_OPTIMIZER_ADVICE = (
    "The optimizer takes a large part of the step. A larger batch needs fewer optimizer steps "
    "(`launcher find noise` measures how large a batch is useful). If the recipe builds its own "
    "optimizer, use a fused one."
)
_FP32_ADVICE = (
    "The step mostly computes in fp32. Set precision=bf16, or tf32=true, which changes the results "
    "less: both use units of the GPU that are several times as fast."
)
_OTHER_ADVICE = {
    "cuda": (
        "The GPU is idle while Python launches the next kernel. Try compile=true, a larger "
        "micro_batch_size, or fewer and larger operations."
    ),
    "cpu": (
        "Much of the step is neither the model nor its data: it is Python overhead between the "
        "parts of small steps."
    ),
}


class _Arguments(msgspec.Struct):
    """Further values of an event."""

    correlation: int | None = None
    """An id that a kernel shares with the call that launched it."""


class _Event(msgspec.Struct):
    """A duration event of a trace, with times in microseconds."""

    name: str = ""
    ph: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    tid: int | str = 0
    args: _Arguments = msgspec.field(default_factory=_Arguments)


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815  # the format's own


@dataclass(frozen=True, kw_only=True)
class Profile:
    """The time of the profiled steps of one rank, by part and by operation."""

    steps: int
    """Number of profiled steps."""

    step_seconds: float
    """Mean duration of a step, in seconds."""

    parts: dict[str, float]
    """Mean seconds per step of each of `PARTS`."""

    operations: list[tuple[str, float]]
    """(name, mean seconds per step) of the longest operations, without the operations they call."""


@dataclass(frozen=True)
class _Interval:
    begin: float
    end: float
    name: str
    """The part of the step."""


def read_profile(path: Path) -> Profile:
    """Read a trace and return the time of its steps by part.

    Args:
        path: A JSON trace of torch.profiler, compressed with gzip if its name ends in .gz.

    Raises:
        ValueError: The file is not a trace, or the trace has no steps.
    """
    return account(_read_events(path))


def _read_events(path: Path) -> list[_Event]:
    """Return the duration events of a trace.

    Raises:
        ValueError: The file is not a trace.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        trace = msgspec.json.decode(content, type=_Trace)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is not a trace of torch.profiler: {error}") from None
    return [event for event in trace.traceEvents if event.ph == "X"]


def holds_kernels(path: Path) -> bool:
    """Return whether a trace has kernels of a GPU.

    Raises:
        ValueError: The file is not a trace.
    """
    return any(event.cat in _KERNEL_CATEGORIES for event in _read_events(path))


def account(events: Sequence[_Event]) -> Profile:
    """Return the time of the steps in a trace by part.

    Args:
        events: The duration events of the trace.

    Raises:
        ValueError: The trace has no steps.
    """
    steps = [e for e in events if e.name.startswith(_STEP_PREFIX) and e.cat == "user_annotation"]
    if not steps:
        raise ValueError("the trace has no steps: it has no event named ProfilerStep#<number>")
    begin, end = min(e.ts for e in steps), max(e.ts + e.dur for e in steps)
    main_thread = steps[0].tid
    ranges = [e for e in events if e.cat == "user_annotation" and e.name.startswith(PREFIX)]
    launches: dict[int, float] = {}
    if any(event.cat in _KERNEL_CATEGORIES for event in events):
        kernels = [e for e in events if e.cat in _KERNEL_CATEGORIES]
        work = [e for e in kernels if not _is_collective(e)]
        collectives = [e for e in kernels if _is_collective(e)]
        idle = [e for e in ranges if e.name == f"{PREFIX}data"]
        launches = {
            e.args.correlation: e.ts
            for e in events
            if e.cat in _LAUNCH_CATEGORIES and e.args.correlation is not None
        }
    else:
        operations = [e for e in events if e.cat == "cpu_op" and e.tid == main_thread]
        work = [e for e in operations if not _is_collective(e)]
        collectives = [
            e for e in events if _is_collective(e) and (e.cat != "cpu_op" or e.tid == main_thread)
        ]
        idle = ranges
    find_part = _part_finder(ranges)
    moments = [launches.get(e.args.correlation or -1, e.ts) for e in work]
    working = [
        _Interval(e.ts, e.ts + e.dur, find_part(moment))
        for e, moment in zip(work, moments, strict=True)
    ]
    totals = _sweep([working, _intervals(collectives), _intervals(idle)], begin, end)
    longest = sorted(_self_times(work).items(), key=lambda item: -item[1])[:_MAX_OPERATIONS]
    scale = 1e-6 / len(steps)
    return Profile(
        steps=len(steps),
        step_seconds=(end - begin) * scale,
        parts={part: totals[part] * scale for part in PARTS},
        operations=[(name, microseconds * scale) for name, microseconds in longest],
    )


def _is_collective(event: _Event) -> bool:
    return event.name.startswith(_COLLECTIVE_PREFIXES)


def _part_finder(ranges: Iterable[_Event]) -> Callable[[float], str]:
    """Return a function that returns the part of the step that Python is in at a moment.

    Args:
        ranges: The ranges of Python code that are named after parts.
    """
    edges: list[tuple[float, bool, str]] = []
    for event in ranges:
        part = event.name.removeprefix(PREFIX)
        edges += [(event.ts, True, part), (event.ts + event.dur, False, part)]
    moments, names, is_open = [-math.inf], ["other"], ["other"]
    for moment, begins, part in sorted(edges):
        if begins:
            is_open.append(part)
        else:
            is_open.remove(part)
        moments.append(moment)
        names.append(is_open[-1])
    return lambda moment: names[bisect.bisect_right(moments, moment) - 1]


def _intervals(events: Iterable[_Event]) -> list[_Interval]:
    return [_Interval(e.ts, e.ts + e.dur, e.name.removeprefix(PREFIX)) for e in events]


def _sweep(kinds: Sequence[Sequence[_Interval]], begin: float, end: float) -> dict[str, float]:
    """Return the total time of each part of a step, in microseconds.

    Args:
        kinds: Intervals of work, of collectives, and of the parts that count while neither work nor
            a collective runs.
        begin: Start of the first step.
        end: End of the last step.
    """
    edges: list[tuple[float, int, int, str]] = []
    for kind, intervals in enumerate(kinds):
        for interval in intervals:
            first, last = max(interval.begin, begin), min(interval.end, end)
            if last > first:
                edges += [(first, 1, kind, interval.name), (last, -1, kind, interval.name)]
    edges.sort()
    open_counts = [Counter[str]() for _ in kinds]
    totals = dict.fromkeys(PARTS, 0.0)
    previous = begin
    for time, change, kind, name in [*edges, (end, 0, 0, "")]:
        if time > previous:
            totals[_part(open_counts)] += time - previous
            previous = time
        open_counts[kind][name] += change
        if not open_counts[kind][name]:
            del open_counts[kind][name]
    return totals


def _part(open_counts: list[Counter[str]]) -> str:
    """Return the part of a step that an instant belongs to, by the intervals open at it."""
    work, collectives, idle = open_counts
    if work:
        return next((name for name in work if name in PARTS), "other")
    if collectives:
        return "communication"
    return next((name for name in idle if name in PARTS), "other")


def _self_times(events: list[_Event]) -> dict[str, float]:
    """Return the microseconds of each operation by name, without nested operations."""
    totals: dict[str, float] = defaultdict(float)
    by_thread: dict[int | str, list[_Event]] = {}
    for event in events:
        by_thread.setdefault(event.tid, []).append(event)
    for thread_events in by_thread.values():
        stack: list[_Event] = []
        for event in sorted(thread_events, key=lambda event: (event.ts, -event.dur)):
            while stack and stack[-1].ts + stack[-1].dur <= event.ts:
                stack.pop()
            totals[event.name] += event.dur
            if stack:
                totals[stack[-1].name] -= event.dur
            stack.append(event)
    return totals


def advice(profiles: Sequence[Profile], plan: Plan) -> list[str]:
    """Return advice on the parts that take much of a step, the largest part first.

    Args:
        profiles: Profile of each rank; the advice is about their mean.
        plan: The plan of the profiled run.
    """
    num_ranks = len(profiles)
    mean_step = sum(profile.step_seconds for profile in profiles) / num_ranks
    shares = {
        part: sum(profile.parts[part] for profile in profiles) / num_ranks / mean_step
        for part in PARTS
    }
    items: list[tuple[float, str]] = []
    if shares["data"] > _LARGE_SHARE:
        items.append((shares["data"], _data_advice(plan)))
    if shares["communication"] > _LARGE_SHARE:
        items.append((shares["communication"], _communication_advice(profiles, plan)))
    if shares["optimizer"] > 2 * _LARGE_SHARE:
        items.append((shares["optimizer"], _OPTIMIZER_ADVICE))
    if shares["other"] > 2 * _LARGE_SHARE:
        items.append((shares["other"], _OTHER_ADVICE[plan.device]))
    computing = shares["forward"] + shares["backward"]
    if plan.device == "cuda" and plan.precision == "fp32" and computing > 0.5:
        items.append((computing, _FP32_ADVICE))
    items.sort(key=lambda item: -item[0])
    return [f"{share:.0%}: {text}" for share, text in items] or [
        "Nothing stands out: the step is mostly forward and backward."
    ]


def _data_advice(plan: Plan) -> str:
    num_workers = plan.workers_per_rank
    reason = (
        f"num_workers={num_workers} per rank is too few"
        if num_workers
        else "there are no workers: num_workers=0"
    )
    return (
        f"Steps wait for data; {reason}. `launcher find loader` measures how many "
        "workers are useful. If all cores are busy, make decoding cheaper, or store the samples in "
        "the form in which the model uses them."
    )


def _communication_advice(profiles: Sequence[Profile], plan: Plan) -> str:
    own_seconds = [profile.step_seconds - profile.parts["communication"] for profile in profiles]
    slowest = max(range(len(own_seconds)), key=own_seconds.__getitem__)
    others = sorted(own_seconds[:slowest] + own_seconds[slowest + 1 :])
    ratio = own_seconds[slowest] / others[len(others) // 2] if others else 1.0
    if ratio > _STRAGGLER_RATIO:
        return (
            f"The other ranks wait for rank {slowest}, whose own work takes {ratio:.2f} times as "
            "long as theirs. Check its data, its device and what else runs on its node "
            "(`launcher doctor`)."
        )
    hints = ["A larger batch computes more per collective."]
    strategy = STRATEGIES[plan.strategy]
    if strategy.shards_parameters:
        hints.append("If the model fits, strategy=ddp or zero1 communicates less.")
    if plan.precision == "fp32" and strategy.gathers_parameters_in_autocast_dtype:
        hints.append("With precision=bf16 the weights that are sent have half the size.")
    if plan.accumulation_steps > 1 and strategy.shards_parameters:
        hints.append("A larger micro_batch_size gathers the weights less often.")
    if plan.sharding is not None and plan.sharding.spans_nodes and plan.nproc_per_node > 1:
        hints.append("If its state fits on one node, shard=node gathers weights inside nodes.")
    hints.append("`launcher doctor` measures the links.")
    return f"Ranks wait for communication. {' '.join(hints)}"
