"""The search for the cheapest strategy that fits into a memory limit."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from launcher.analysis.batch_sizes import MEMORY_MARGIN
from launcher.analysis.strategy_choice import (
    StrategyCandidate,
    StrategyTrial,
    cheapest_first,
    fastest,
    sent_bytes,
)
from launcher.environment.machine import free_memory_bytes
from launcher.errors import PlanError
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.fsdp_settings import FSDP_DEFAULTS
from launcher.planning.global_batch import ceil_div
from launcher.planning.memory import rank_memory
from launcher.planning.memory_facts import MemoryFacts, layout_of
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipe.recipe import Recipe
from launcher.runs.plan_recipe import plan_recipe
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.tuning.batch_search import MICRO_STEPS, MOST_STEPS
from launcher.tuning.memory_plan import (
    is_this_machine,
    measure_model_memory,
    plan_again,
    variants,
)
from launcher.tuning.memory_trial import try_in_memory
from launcher.tuning.probe_run import Probe, Target


@dataclass(frozen=True, kw_only=True)
class StrategySearchResult:
    """The result of a search for a strategy."""

    limit_bytes: int | None
    """Memory limit of each rank, less the margin; None if unknown."""

    host_limit_bytes: int | None
    """Host memory of a node, less the margin; None if unknown."""

    num_values: int
    """Weights of the model."""

    candidates: tuple[StrategyCandidate, ...]
    """All combinations; those that fit come first, the cheapest of them before the others."""

    trials: tuple[StrategyTrial, ...]
    """Outcome of each trial, in the order in which they ran."""

    chosen: StrategyCandidate | None
    """The fastest trial that fits or, without trials, the cheapest candidate; None if none fits."""

    settings: dict[str, Any]
    """The settings of `chosen` that differ from the plan."""

    notes: tuple[str, ...]
    """Notes for the reader: what could not be found out, and why."""


class StrategySearch:
    """A search over strategies, offloading, activation checkpointing and micro-batches.

    The memory of each combination is computed from the sizes of the model, which are measured in a
    short process. The cheapest combinations that fit are then tried in short trainings.

    Args:
        target: The recipe.
        memory: Memory of each rank in bytes; None is its GPU's memory, or its part of the free
            host memory.
        nodes: Number of nodes.
        strategies: Names of the strategies among which to search; None is all.

    Raises:
        PlanError: The recipe cannot be trained with these settings on these ranks.
    """

    def __init__(
        self,
        target: Target,
        *,
        memory: int | None,
        nodes: int = 1,
        strategies: Collection[str] | None = None,
    ) -> None:
        self._target, self._memory = target, memory
        self._strategies = STRATEGIES if strategies is None else strategies
        self._built, self.plan = plan_recipe(
            target.reference,
            target.overrides,
            target.machine,
            nodes=nodes,
            nproc_per_node=target.nproc_per_node,
            elsewhere=True,
        )
        self._is_here = is_this_machine(self.plan, target.machine)

    @property
    def can_measure(self) -> bool:
        """Return whether this machine can run all ranks of the plan."""
        return self._is_here and self.plan.nodes == 1

    def run(
        self,
        run_dir: RunDir | None,
        signals: SignalHandler,
        on_trial: Callable[[StrategyTrial], None],
        *,
        num_trials: int,
    ) -> StrategySearchResult:
        """Compute the memory of all combinations and try the cheapest that fit.

        Args:
            run_dir: Folder that receives a folder for each trial; None tries nothing.
            signals: The signal handler of this process.
            on_trial: Receives the outcome of each trial.
            num_trials: Trials to run. If none of them fits, the next combinations are tried until
                one does.

        Raises:
            TrainingError: A trial failed for a reason other than memory.
        """
        target, plan = self._target, self.plan
        facts = measure_model_memory(target.reference, target.overrides, self._built, plan, signals)
        limit, host_limit = self._limits(facts)
        candidates = [
            candidate
            for recipe, variant in variants(facts, self._built.recipe, plan)
            if variant.strategy in self._strategies
            for candidate in self._candidates(facts, recipe, variant, limit, host_limit)
        ]
        ordered = cheapest_first(candidates)
        others = sorted(
            (candidate for candidate in candidates if not candidate.fits),
            key=lambda candidate: candidate.planned_bytes,
        )
        trials: list[StrategyTrial] = []
        for candidate in ordered if run_dir is not None else ():
            if len(trials) >= num_trials and fastest(trials) is not None:
                break
            assert run_dir is not None
            trials.append(self._try(candidate, len(trials) + 1, limit, run_dir, signals))
            on_trial(trials[-1])
        best = fastest(trials)
        if run_dir is not None:
            chosen = None if best is None else best.candidate
        else:
            chosen = ordered[0] if ordered else None
        return StrategySearchResult(
            limit_bytes=limit,
            host_limit_bytes=host_limit,
            num_values=facts.model.num_values,
            candidates=(*ordered, *others),
            trials=tuple(trials),
            chosen=chosen,
            settings={} if chosen is None else self._settings(chosen),
            notes=facts.model.notes,
        )

    def _limits(self, facts: MemoryFacts) -> tuple[int | None, int | None]:
        """Return the memory limits of a rank and of the host of a node, less the margin."""
        plan, memory = self.plan, self._memory
        host = (plan.machine.memory_bytes or None) if self._is_here else None
        if memory is None:
            memory = facts.device_bytes
            if plan.device == "cpu":
                memory = (free_memory_bytes() or plan.machine.memory_bytes) // plan.nproc_per_node
        return (
            None if memory is None else int(memory * (1 - MEMORY_MARGIN)),
            None if host is None else int(host * (1 - MEMORY_MARGIN)),
        )

    def _candidates(
        self,
        facts: MemoryFacts,
        recipe: Recipe,
        plan: Plan,
        limit: int | None,
        host_limit: int | None,
    ) -> Iterator[StrategyCandidate]:
        """Yield the combinations of a strategy: with and without checkpointing."""
        checkpointing = {recipe.activation_checkpointing}
        if facts.model.checkpointed is not None:
            checkpointing.add(True)
        for recomputes in sorted(checkpointing):
            found = None
            for size in _sizes(plan.micro_batch_size):
                variant = replace(
                    recipe, activation_checkpointing=recomputes, micro_batch_size=size
                )
                try:
                    found = _candidate(facts, plan_again(variant, plan), limit, host_limit)
                except PlanError:
                    continue
                if found.fits:
                    break
            if found is not None:
                yield found

    def _settings(self, chosen: StrategyCandidate) -> dict[str, Any]:
        """Return the settings of a candidate that differ from the plan."""
        planned = self.plan.settings
        values: dict[str, Any] = {
            "strategy": chosen.strategy,
            "offload": "cpu" if chosen.offload else None,
            "activation_checkpointing": chosen.activation_checkpointing,
        }
        if chosen.shard is not None:
            values["shard"] = chosen.shard
        settings = {name: value for name, value in values.items() if planned.get(name) != value}
        if not STRATEGIES[chosen.strategy].uses_fsdp:
            settings |= {
                name: default
                for name, default in FSDP_DEFAULTS.items()
                if planned.get(name) != default
            }
        if chosen.micro_batch_size != self.plan.micro_batch_size:
            settings["micro_batch_size"] = chosen.micro_batch_size
        return settings

    def _try(
        self,
        candidate: StrategyCandidate,
        number: int,
        limit: int | None,
        search_dir: RunDir,
        signals: SignalHandler,
    ) -> StrategyTrial:
        from launcher.engine.worker import agent_strategy_probe

        probe = self._plan_trial(candidate)
        path = search_dir.path / f"strategy-{number}-{candidate.strategy}"
        run_dir = create_run_dir(path, probe.plan.recipe)
        reading = try_in_memory(
            probe,
            run_dir,
            agent_strategy_probe,
            signals,
            title=candidate.title,
            memory_bytes=limit,
        )
        if reading is None:
            return StrategyTrial(candidate=candidate, fits=False)
        peak = reading.peak_bytes
        return StrategyTrial(
            candidate=candidate,
            fits=limit is None or (peak is not None and peak <= limit),
            peak_bytes=peak,
            start_peak_bytes=reading.start_peak_bytes,
            samples_per_second=reading.samples_per_second,
        )

    def _plan_trial(self, candidate: StrategyCandidate) -> Probe:
        settings: dict[str, Any] = {
            "strategy": candidate.strategy,
            "offload": "cpu" if candidate.offload else None,
            "activation_checkpointing": candidate.activation_checkpointing,
            "micro_batch_size": candidate.micro_batch_size,
            "steps": MOST_STEPS,
            "schedule": "constant()",
            "batch_milestones": (),
            "record_samples": False,
            "noise_scale": False,
        }
        if not STRATEGIES[candidate.strategy].uses_fsdp:
            settings |= FSDP_DEFAULTS
        if candidate.accumulation_steps > MICRO_STEPS and self.plan.virtual_ranks is None:
            settings["batch_size"] = self.plan.data_ranks * candidate.micro_batch_size * MICRO_STEPS
        return self._target.with_settings("find strategy", **settings).probe()


def _candidate(
    facts: MemoryFacts, plan: Plan, limit: int | None, host_limit: int | None
) -> StrategyCandidate:
    layout = layout_of(plan)
    memory = rank_memory(facts.model, layout)
    return StrategyCandidate(
        strategy=plan.strategy,
        shard=layout.shard,
        offload=layout.offload,
        activation_checkpointing=layout.activation_checkpointing,
        micro_batch_size=plan.micro_batch_size,
        accumulation_steps=plan.accumulation_steps,
        planned_bytes=memory.place.peak,
        planned_training_bytes=memory.place.training_peak,
        planned_host_bytes=memory.node_host_bytes,
        sent_bytes=sent_bytes(facts.model, layout, plan.accumulation_steps),
        fits=(limit is None or memory.place.peak <= limit)
        and (host_limit is None or memory.node_host_bytes <= host_limit),
    )


def _sizes(largest: int) -> Sequence[int]:
    """Return micro-batch sizes from the largest down to 1, each about half of the one before."""
    sizes = [largest]
    while sizes[-1] > 1:
        sizes.append(ceil_div(sizes[-1], 2))
    return sizes
