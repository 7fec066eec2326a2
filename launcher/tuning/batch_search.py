"""The search for the largest micro-batch that fits into memory and for the fastest one."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from launcher.analysis.batch_sizes import MEMORY_MARGIN, SizeTrial, next_size
from launcher.environment.machine import free_memory_bytes
from launcher.errors import LauncherError, RunDirError
from launcher.json_file import exact_floats, find_json
from launcher.launch.signal_handler import SignalHandler
from launcher.paths import is_file
from launcher.planning.global_batch import ceil_div
from launcher.runs.cache import cache_folder
from launcher.runs.files import write_json
from launcher.runs.provenance import versions
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.memory_trial import try_in_memory
from launcher.tuning.probe_run import Probe, Target

MOST_STEPS = 200
"""Most steps of a trial. It times them for half a second, or four if these take longer."""

MICRO_STEPS = 2
"""Micro-steps per step of a trial with accumulation: the second computes while gradients exist."""


@dataclass(frozen=True, kw_only=True)
class BatchSearchResult:
    """The result of a search for a micro-batch size."""

    trials: tuple[SizeTrial, ...]
    """Outcome of each trial, in the order in which they ran."""

    share: int
    """Samples of a rank in one global batch, the largest possible micro-batch."""

    memory_bytes: int | None
    """Memory limit of each rank, less the margin; None is the whole GPU, less the margin."""


class BatchSearch:
    """A search over micro-batch sizes, each of which is tried in new processes.

    A trial trains a few steps with a global batch of its own, so the recipe's global batch does
    not change. Trials stay in memory: a second `run` continues where the first one stopped.

    Args:
        target: The recipe.
        memory: Memory of each rank in bytes; None is its GPU's memory, or its part of the free
            host memory.
        first: Size of the first trial; None starts at an eighth of a rank's share.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
    """

    def __init__(self, target: Target, *, memory: int | None, first: int | None = None) -> None:
        self._target, self._first = target, first
        _, self.plan = target.plan()
        self.share = max(self.plan.samples_per_rank)
        self.asked_memory = memory
        if memory is None and self.plan.device == "cpu":
            free = free_memory_bytes() or target.machine.memory_bytes
            memory = free // self.plan.nproc_per_node
        self.memory = None if memory is None else int(memory * (1 - MEMORY_MARGIN))
        self._trials: list[SizeTrial] = []

    def run(
        self, run_dir: RunDir, signals: SignalHandler, on_trial: Callable[[SizeTrial], None]
    ) -> BatchSearchResult:
        """Try sizes until the largest that fits is known.

        Args:
            run_dir: Folder that receives a folder for each trial.
            signals: The signal handler of this process.
            on_trial: Receives the outcome of each trial.

        Raises:
            TrainingError: A trial failed for a reason other than memory.
        """
        while (size := next_size(self._trials, self.share, first=self._first)) is not None:
            trial = self._try_size(size, run_dir, signals)
            self._trials.append(trial)
            on_trial(trial)
        return BatchSearchResult(
            trials=tuple(self._trials), share=self.share, memory_bytes=self.memory
        )

    def _try_size(self, size: int, search_dir: RunDir, signals: SignalHandler) -> SizeTrial:
        from launcher.engine.worker import agent_size_probe

        probe = self._plan_trial(size)
        run_dir = create_run_dir(search_dir.path / f"size-{size}", probe.plan.recipe)
        reading = try_in_memory(
            probe,
            run_dir,
            agent_size_probe,
            signals,
            title=f"micro_batch_size={size}",
            memory_bytes=self.memory,
        )
        if reading is None:
            return SizeTrial(size=size, fits=False)
        return SizeTrial(
            size=size,
            fits=True,
            samples_per_second=reading.samples_per_second,
            peak_bytes=reading.peak_bytes,
            num_trained=reading.num_trained,
        )

    def _plan_trial(self, size: int) -> Probe:
        micro_steps = min(MICRO_STEPS, ceil_div(self.share, size))
        batch_size = self.plan.data_ranks * size * micro_steps
        if self.plan.train_samples is not None:
            batch_size = min(batch_size, self.plan.train_samples)
        return self._target.with_settings(
            "find batch",
            batch_size=batch_size,
            micro_batch_size=size,
            steps=MOST_STEPS,
            schedule="constant()",
            batch_milestones=(),
            record_samples=False,
            noise_scale=False,
        ).probe()


def cache_path(target: Target, search: BatchSearch) -> Path:
    """Return the file that caches the result of a search.

    The path depends on everything that the result depends on: the recipe and the text of its file,
    the settings, the machine, device, precision, strategy, ranks and memory, and the versions of
    the packages.
    """
    plan = search.plan
    recipe_file = Path(target.reference.location.rpartition(":")[0])
    text = recipe_file.read_bytes() if is_file(recipe_file) else None
    key: dict[str, Any] = {
        "recipe": target.reference.location,
        "text": "" if text is None else hashlib.sha256(text).hexdigest(),
        "overrides": [[override.name, repr(override.value)] for override in target.overrides],
        "machine": asdict(replace(plan.machine, hostname="")),
        "plan": [plan.device, plan.precision, plan.strategy, plan.world_size, search.share],
        "memory": search.asked_memory,
        "versions": versions(),
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
    return cache_folder("batch") / f"{digest[:32]}.json"


def read_cache(path: Path) -> BatchSearchResult | None:
    """Return the cached result, or None if there is none that can be read."""
    with contextlib.suppress(RunDirError):
        return find_json(path, BatchSearchResult, exact=True)
    return None


def write_cache(path: Path, result: BatchSearchResult) -> None:
    """Write a result to the cache; a cache that cannot be written is ignored."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, exact_floats(asdict(result)))
    except (OSError, LauncherError):
        return
