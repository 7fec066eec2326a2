"""The memory of a rank under each strategy: the sizes are measured in a short process of its own.

The process builds the model without memory for its values (`launcher.engine.probes.model_memory`),
so a plan takes seconds, and needs no GPU, for a model of any size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from launcher.environment.machine import Machine
from launcher.errors import PlanError
from launcher.launch.examination import examined
from launcher.launch.signal_handler import SignalHandler
from launcher.planning.fsdp_settings import FSDP_DEFAULTS
from launcher.planning.memory import RankMemory, fitting, rank_memory
from launcher.planning.memory_facts import MemoryFacts, ModelMemory, layout_of
from launcher.planning.plan import Plan
from launcher.planning.planner import make_plan
from launcher.planning.strategy import STRATEGIES
from launcher.quantities import size
from launcher.recipe.overrides import BuiltRecipe, Override
from launcher.recipe.recipe import Recipe, StrategyName
from launcher.recipe.resolve import Reference
from launcher.runs.plan_recipe import describe_run


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """The memory of a rank under the planned strategy, and under all others."""

    model: ModelMemory
    """The sizes of the model."""

    planned: RankMemory
    """The memory under the planned strategy."""

    alternatives: tuple[RankMemory, ...]
    """The memory under each strategy, with and without offload=cpu, as far as it can train."""

    device_bytes: int | None
    """Memory of the smallest GPU; None if unknown, and for CPU ranks."""

    host_bytes: int | None
    """Host memory of a node; None if unknown."""

    def check(self) -> None:
        """Refuse a plan that does not fit whatever its activations are.

        Raises:
            PlanError: The GPU or the host of a node has less memory than weights, gradients,
                optimizer state and buffers need.
        """
        planned, gpu, host = self.planned, self.device_bytes, self.host_bytes
        nproc = planned.layout.nproc_per_node
        on_host = nproc * planned.host.certain_peak
        if gpu is not None and planned.device.certain_peak > gpu:
            needed = f"{size(planned.device.certain_peak)} on each GPU, which has {size(gpu)}"
        elif host is not None and on_host > host:
            needed = (
                f"{size(on_host)} of host memory for the {nproc} ranks of a node, which has "
                f"{size(host)}"
            )
        else:
            return
        others = fitting(self.alternatives, device_bytes=gpu, host_bytes=host)
        remedy = "No strategy fits on these ranks: use more ranks or nodes, or a smaller model."
        if others:
            names = "; ".join(
                f"strategy={other.layout.title} ({size(other.place.peak)})" for other in others
            )
            remedy = f"What fits, with its memory per rank: {names}."
        raise PlanError(
            f"strategy={planned.layout.title} on {planned.layout.num_ranks} ranks needs {needed}, "
            f"without what activations need. {remedy}"
        )


def plan_memory(facts: MemoryFacts, recipe: Recipe, plan: Plan, *, is_here: bool) -> MemoryPlan:
    """Return the memory of a rank of a plan, and of its alternatives.

    Args:
        facts: The sizes of the model.
        recipe: The recipe of the plan.
        plan: The plan.
        is_here: Whether the nodes of the plan are taken to be this machine, so that its memory is
            theirs.

    Raises:
        PlanError: The strategy of the plan cannot train the model with the recipe's optimizer.
    """
    if plan.strategy in facts.refused:
        raise PlanError(facts.refused[plan.strategy])
    return MemoryPlan(
        model=facts.model,
        planned=rank_memory(facts.model, layout_of(plan)),
        alternatives=tuple(
            rank_memory(facts.model, layout_of(other)) for _, other in variants(facts, recipe, plan)
        ),
        device_bytes=facts.device_bytes if plan.device == "cuda" else None,
        host_bytes=(plan.machine.memory_bytes or None) if is_here else None,
    )


def variants(facts: MemoryFacts, recipe: Recipe, plan: Plan) -> Iterator[tuple[Recipe, Plan]]:
    """Yield the recipe and its plan under each strategy, on GPUs with and without offload=cpu.

    Those that cannot train the recipe on the ranks of the plan are left out.
    """
    for name in get_args(StrategyName):
        if name in facts.refused:
            continue
        # On a CPU rank all is in host memory already.
        offloads: set[Literal["cpu"] | None] = {None}
        if STRATEGIES[name].shards and plan.device == "cuda":
            offloads.add("cpu")
        if name == recipe.strategy:
            offloads.add(recipe.offload)
        for offload in sorted(offloads, key=str):
            for of_fsdp in _settings_of_fsdp(name, recipe, plan):
                variant = replace(recipe, strategy=name, offload=offload, **of_fsdp)
                try:
                    yield variant, plan_again(variant, plan)
                except PlanError:
                    continue


def _settings_of_fsdp(name: str, recipe: Recipe, plan: Plan) -> Iterator[Mapping[str, Any]]:
    """Yield the settings of FSDP with which a strategy is compared.

    On several nodes, weights are also sharded over all ranks instead of those of a node.
    """
    if not STRATEGIES[name].uses_fsdp:
        yield FSDP_DEFAULTS
        return
    yield {}
    if plan.nodes > 1 and recipe.shard != "all":
        yield {"shard": "all"}


def plan_again(recipe: Recipe, plan: Plan) -> Plan:
    """Return the plan of a variant of a recipe on the ranks of a plan.

    Raises:
        PlanError: The variant cannot be trained on these ranks.
    """
    return make_plan(
        recipe,
        plan.machine,
        nodes=plan.nodes,
        nproc_per_node=plan.nproc_per_node,
        train_samples=plan.train_samples,
    )


def measure_model_memory(
    reference: Reference,
    overrides: Sequence[Override],
    built: BuiltRecipe,
    plan: Plan,
    signals: SignalHandler,
) -> MemoryFacts:
    """Measure the sizes of a recipe's model in a short process, on a CPU.

    Args:
        reference: The recipe.
        overrides: Settings that were applied to it.
        built: The recipe with these settings.
        plan: Its plan.
        signals: Handler of the signals that stop the process.

    Raises:
        RunFailedError: The recipe raised an exception.
    """
    from launcher.engine.probes.model_memory import read_memory
    from launcher.engine.worker import agent_model_memory

    # What the process imports depends on the strategy, and this one needs no backend.
    process_plan = replace(plan, nproc_per_node=1, strategy="ddp", backend="local", device="cpu")
    description = describe_run(reference, built, plan)
    with examined(
        reference, overrides, description, process_plan, agent_model_memory, signals
    ) as run_dir:
        return read_memory(run_dir)


def is_this_machine(plan: Plan, machine: Machine) -> bool:
    """Return whether a plan is for nodes like this machine, and not for others with more GPUs."""
    return plan.device == "cpu" or plan.machine.num_gpus == machine.num_gpus
