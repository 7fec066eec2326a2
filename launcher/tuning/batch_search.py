"""The largest micro-batch that fits into memory, and the fastest."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.analysis.batch_sizes import MARGIN, SizeTrial, next_size
from launcher.environment.machine import free_memory_bytes
from launcher.errors import EXIT_FAILED, LauncherError, TrainingError
from launcher.launch.signal_handler import SignalHandler
from launcher.runs.cache import cache_folder
from launcher.runs.failure_record import RunFailedError
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir, create_run_dir, write_json
from launcher.tuning.probe_run import Probe, Target, run_probe

STEPS = 4
"""Steps that are timed, after a first that allocates and connects."""

_ENDS_FOR_MEMORY = ("was killed by SIGKILL", "was killed by SIGABRT")
"""By the kernel, or by C++ where an allocation fails in a thread that nobody catches it in."""

_MICRO_STEPS = 2
"""Of a step of a trial: gradients are there while the second is computed, as in accumulation."""


@dataclass(frozen=True, kw_only=True)
class FoundBatch:
    """What the sizes came to."""

    trials: tuple[SizeTrial, ...]
    share: int
    """A rank's samples of a global batch: no micro-batch is larger."""

    memory_bytes: int | None
    """What each rank was allowed, the margin taken off; None is the GPU less the margin."""


class BatchSearch:
    """Tries one size after the other, each in fresh processes; what is known is not tried again.

    The global batch of the recipe is not touched: a trial takes a few short steps of its own.

    Args:
        target: The recipe.
        memory: Bytes for each rank; None is the memory of its GPU, or its part of what is free.
        first: The size to begin with; None is an eighth of a rank's share.

    Raises:
        PlanError: The recipe cannot be trained like that.
    """

    def __init__(self, target: Target, *, memory: int | None, first: int | None = None) -> None:
        self._target, self._first = target, first
        _, self.plan = target.plan()
        self.share = max(self.plan.samples_per_rank)
        self.asked_memory = memory
        if memory is None and self.plan.device == "cpu":
            free = free_memory_bytes() or target.machine.memory_bytes
            memory = free // self.plan.nproc_per_node
        self.memory = None if memory is None else int(memory * (1 - MARGIN))
        self._trials: list[SizeTrial] = []

    def run(
        self, run_dir: RunDir, signals: SignalHandler, tell: Callable[[SizeTrial], None]
    ) -> FoundBatch:
        """Search to the end, with a folder in `run_dir` for each trial; `tell` hears of each.

        Raises:
            TrainingError: A trial failed for another reason than memory.
        """
        while (size := next_size(self._trials, self.share, first=self._first)) is not None:
            trial = self._try(size, run_dir, signals)
            self._trials.append(trial)
            tell(trial)
        return FoundBatch(trials=tuple(self._trials), share=self.share, memory_bytes=self.memory)

    def _try(self, size: int, folder: RunDir, signals: SignalHandler) -> SizeTrial:
        from launcher.engine.worker import agent_size_probe

        probe = self._plan(size)
        run_dir = create_run_dir(folder.path / f"size-{size}", probe.plan.recipe)
        try:
            run_probe(
                probe,
                run_dir,
                agent_size_probe,
                signals,
                memory_bytes=self.memory,
                quiet=True,
            )
        except RunFailedError as error:
            if error.exit_code != EXIT_FAILED:
                raise
            if error.failure.out_of_memory or any(
                name in error.failure.message for name in _ENDS_FOR_MEMORY
            ):
                return SizeTrial(size=size, fits=False)
            raise TrainingError(
                f"With micro_batch_size={size} the recipe failed, and not because memory ran out:"
                f"\n\n{error}"
            ) from None
        values = json.loads(run_dir.size.read_text(encoding="utf-8"))
        return SizeTrial(size=size, fits=True, **values)

    def _plan(self, size: int) -> Probe:
        ranks, samples = self.plan.world_size, self.plan.train_samples
        whole = ranks * size * _MICRO_STEPS
        if samples is not None:
            whole = min(whole, samples)
        return self._target.having(
            "find batch",
            batch_size=whole,
            micro_batch_size=size,
            steps=1 + STEPS,
            schedule="constant()",
            batch_milestones=(),
            record_samples=False,
            noise_scale=False,
        ).probe()


def cache_path(target: Target, search: BatchSearch) -> Path:
    """Return where the answer to a search is kept for the next time.

    It is another file for another recipe or another text of its file, other settings, another
    machine, device, precision, strategy, number of ranks or memory, and other versions.
    """
    plan = search.plan
    file = Path(target.reference.location.rpartition(":")[0])
    key: dict[str, Any] = {
        "recipe": target.reference.location,
        "text": hashlib.sha256(file.read_bytes()).hexdigest() if file.is_file() else "",
        "overrides": [[each.name, repr(each.value)] for each in target.overrides],
        "machine": asdict(replace(plan.machine, hostname="")),
        "plan": [plan.device, plan.precision, plan.strategy, plan.world_size, search.share],
        "memory": search.asked_memory,
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder("batch") / f"{digest[:32]}.json"


def read_cache(path: Path) -> FoundBatch | None:
    """Return what was found before, if anything was."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        trials = tuple(SizeTrial(**each) for each in values.pop("trials"))
        return FoundBatch(trials=trials, **values)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def write_cache(path: Path, found: FoundBatch) -> None:
    """Keep what was found; that it cannot be kept is no reason to fail."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, asdict(found))
    except (OSError, LauncherError):
        return
