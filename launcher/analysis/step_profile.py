"""Where the time of a step goes, by a trace of torch.profiler, and what to try.

The trace is what `export_chrome_trace` writes. An instant counts for the first that holds:

1. something is computed: for the part of the step that asked for it;
2. ranks talk, with nothing to compute beside it: communication;
3. on CPUs, the part of the step that Python is in; on a GPU, which then has nothing to do, reading
   data if Python waits for that;
4. what is left: other.
"""

from __future__ import annotations

import gzip
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES

PARTS = ("data", "forward", "backward", "communication", "optimizer", "other")
"""Of a step, in its order."""

PREFIX = "launcher::"
"""Of the names of ranges in a trace that say which part of a step they are."""

_STEP = "ProfilerStep#"
_KERNELS = frozenset(("kernel", "gpu_memcpy", "gpu_memset"))
_COLLECTIVES = ("gloo:", "nccl", "c10d::", "c10d_functional::", "_c10d_functional::")
_MUCH = 0.1
_MOST_OPERATIONS = 8
_STRAGGLES = 1.15


_OF_OPTIMIZER = (
    "The optimizer takes a large part: a larger batch takes fewer of its steps (`launcher find "
    "noise` says how large is worth it); an optimizer of the recipe's own should be a fused one."
)
_OF_FP32 = (
    "Most of a step is computing in fp32: precision=bf16, or tf32=true, which changes less, take "
    "units that are several times as fast."
)
_OF_OTHER = {
    "cuda": (
        "The GPU has nothing to do while Python gets to the next kernel: compile=true, a larger "
        "micro_batch_size, fewer and larger operations."
    ),
    "cpu": "Much is neither the model nor its data: Python between the parts of small steps.",
}


class _Event(msgspec.Struct):
    name: str = ""
    ph: str = ""
    cat: str = ""
    ts: float = 0.0
    dur: float = 0.0
    tid: int | str = 0


class _Trace(msgspec.Struct):
    traceEvents: list[_Event]  # noqa: N815  # the format's own


@dataclass(frozen=True, kw_only=True)
class Profile:
    """Where the time of a rank's steps went."""

    steps: int
    step_seconds: float
    parts: dict[str, float]
    """Seconds of a step by `PARTS`, on average."""

    operations: list[tuple[str, float]]
    """(name, seconds of a step) of what takes the longest, itself."""


@dataclass(frozen=True)
class _Interval:
    begin: float
    end: float
    name: str


def read_profile(path: Path) -> Profile:
    """Return where the time went that a trace is of.

    Args:
        path: A JSON file of torch.profiler, compressed if its name ends in .gz.

    Raises:
        ValueError: It is no trace, or has no step.
    """
    content = path.read_bytes()
    if path.suffix == ".gz":
        content = gzip.decompress(content)
    try:
        trace = msgspec.json.decode(content, type=_Trace)
    except msgspec.DecodeError as error:
        raise ValueError(f"{path} is no trace of torch.profiler: {error}") from None
    return account([event for event in trace.traceEvents if event.ph == "X"])


def account(events: Sequence[_Event]) -> Profile:
    """Return where the time went that the events of a trace are of.

    Raises:
        ValueError: There is no step among them.
    """
    steps = [e for e in events if e.name.startswith(_STEP) and e.cat == "user_annotation"]
    if not steps:
        raise ValueError("the trace has no step")
    begin, end = min(e.ts for e in steps), max(e.ts + e.dur for e in steps)
    main = steps[0].tid
    on_gpu = any(event.cat in _KERNELS for event in events)
    if on_gpu:
        work = [e for e in events if e.cat in _KERNELS and not _is_collective(e)]
        talk = [e for e in events if e.cat in _KERNELS and _is_collective(e)]
        own = [e for e in events if e.cat == "gpu_user_annotation" and e.name.startswith(PREFIX)]
        idle = [e for e in events if e.name == f"{PREFIX}data" and e.cat == "user_annotation"]
    else:
        ours = [e for e in events if e.cat == "cpu_op" and e.tid == main]
        work = [e for e in ours if not _is_collective(e)]
        talk = [e for e in events if _is_collective(e) and (e.cat != "cpu_op" or e.tid == main)]
        own = [e for e in events if e.cat == "user_annotation" and e.name.startswith(PREFIX)]
        idle = own
    kinds = [_intervals(each) for each in (work, talk, own, idle)]
    totals = _sweep(kinds, begin, end)
    longest = sorted(_own_times(work).items(), key=lambda each: -each[1])[:_MOST_OPERATIONS]
    scale = 1e-6 / len(steps)
    return Profile(
        steps=len(steps),
        step_seconds=(end - begin) * scale,
        parts={part: totals[part] * scale for part in PARTS},
        operations=[(name, value * scale) for name, value in longest],
    )


def _is_collective(event: _Event) -> bool:
    return event.name.startswith(_COLLECTIVES)


def _intervals(events: Iterable[_Event]) -> list[_Interval]:
    return [_Interval(e.ts, e.ts + e.dur, e.name.removeprefix(PREFIX)) for e in events]


def _sweep(kinds: Sequence[Sequence[_Interval]], begin: float, end: float) -> dict[str, float]:
    """Go through time and give each stretch to the part of the step that it belongs to.

    Args:
        kinds: Work, talk, the ranges that work is asked for in, those that count without either.
        begin: Where to begin.
        end: Where to end.
    """
    edges: list[tuple[float, int, int, str]] = []
    for kind, intervals in enumerate(kinds):
        for each in intervals:
            first, last = max(each.begin, begin), min(each.end, end)
            if last > first:
                name = each.name if kind > 1 else ""
                edges += [(first, 1, kind, name), (last, -1, kind, name)]
    edges.sort()
    open_now = [Counter[str]() for _ in kinds]
    totals = dict.fromkeys(PARTS, 0.0)
    before = begin
    for when, change, kind, name in [*edges, (end, 0, 0, "")]:
        if when > before:
            totals[_part(open_now)] += when - before
            before = when
        open_now[kind][name] += change
        if not open_now[kind][name]:
            del open_now[kind][name]
    return totals


def _part(open_now: list[Counter[str]]) -> str:
    work, talk, own, idle = open_now
    if work:
        return next((name for name in own if name in PARTS), "other")
    if talk:
        return "communication"
    return next((name for name in idle if name in PARTS), "other")


def _own_times(events: list[_Event]) -> dict[str, float]:
    """Return what each operation took by name, without those that it called in its thread."""
    totals: dict[str, float] = defaultdict(float)
    by_thread: dict[int | str, list[_Event]] = {}
    for event in events:
        by_thread.setdefault(event.tid, []).append(event)
    for those in by_thread.values():
        stack: list[_Event] = []
        for event in sorted(those, key=lambda each: (each.ts, -each.dur)):
            while stack and stack[-1].ts + stack[-1].dur <= event.ts:
                stack.pop()
            totals[event.name] += event.dur
            if stack:
                totals[stack[-1].name] -= event.dur
            stack.append(event)
    return totals


def advice(profiles: Sequence[Profile], plan: Plan) -> list[str]:
    """Return what to try, in words, the largest gain first; by what all ranks have in common.

    Args:
        profiles: Of each rank.
        plan: What was profiled.
    """
    count = len(profiles)
    whole = sum(each.step_seconds for each in profiles) / count
    shares = {part: sum(p.parts[part] for p in profiles) / count / whole for part in PARTS}
    found: list[tuple[float, str]] = []
    if shares["data"] > _MUCH:
        found.append((shares["data"], _of_data(plan)))
    if shares["communication"] > _MUCH:
        found.append((shares["communication"], _of_communication(profiles, plan)))
    if shares["optimizer"] > 2 * _MUCH:
        found.append((shares["optimizer"], _OF_OPTIMIZER))
    if shares["other"] > 2 * _MUCH:
        found.append((shares["other"], _OF_OTHER[plan.device]))
    computing = shares["forward"] + shares["backward"]
    if plan.device == "cuda" and plan.precision == "fp32" and computing > 0.5:
        found.append((computing, _OF_FP32))
    return [f"{share:.0%}: {text}" for share, text in sorted(found, key=lambda each: -each[0])] or [
        "Nothing stands out: the step is mostly forward and backward."
    ]


def _of_data(plan: Plan) -> str:
    workers = plan.workers_per_rank
    now = f"{workers} workers per rank are too few" if workers else "without workers"
    return (
        f"Steps wait for data ({now}). `launcher find loader {plan.recipe}` measures how many "
        "workers are worth it; a smaller decode, or samples that are stored as they are used, "
        "help where all cores are taken."
    )


def _of_communication(profiles: Sequence[Profile], plan: Plan) -> str:
    own = [each.step_seconds - each.parts["communication"] for each in profiles]
    slowest = max(range(len(own)), key=own.__getitem__)
    others = sorted(own[:slowest] + own[slowest + 1 :])
    times = own[slowest] / others[len(others) // 2] if others else 1.0
    if times > _STRAGGLES:
        return (
            f"Ranks wait for rank {slowest}, which has {times:.2f} times as much to do itself as "
            "the others: look at its data, its device and what else runs there (`launcher doctor`)."
        )
    hints = ["a larger batch talks as often and computes more"]
    strategy = STRATEGIES[plan.strategy]
    if strategy.shards_parameters:
        hints.append("strategy=ddp or zero1 talks less, if the model fits")
    if plan.precision == "fp32" and strategy.gathers_parameters_in_autocast_dtype:
        hints.append("precision=bf16 sends half of the weights' bytes")
    if plan.accumulation_steps > 1 and strategy.shards_parameters:
        hints.append("a larger micro_batch_size gathers the weights less often")
    hints.append("`launcher doctor` measures the links")
    return f"Ranks wait for communication: {'; '.join(hints)}."
