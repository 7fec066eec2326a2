"""`Plan`: every number of a run that follows from its recipe and its ranks, as one value.

`launcher plan` prints a plan. `launcher run` gives it to the ranks, which refuse to train in a
different world or with a different recipe.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from launcher.environment.machine import Machine
from launcher.environment.world import World
from launcher.errors import RunDirError, WorldError
from launcher.planning.derivations import ranks_text
from launcher.planning.global_batch import BatchSplit, Statistics
from launcher.planning.sharding import Sharding
from launcher.planning.stages import Stage, growth_at
from launcher.planning.strategy import STRATEGIES, Backend, distribute
from launcher.planning.timed_steps import TimedSteps
from launcher.planning.virtual_ranks import VirtualRanks
from launcher.printable import printable_line, shortened
from launcher.recipe.affects import Affects, effects_of
from launcher.recipe.recipe import Recipe, settings_affecting
from launcher.recipe.schedules import Schedule, ScheduleValue

_FORMER_NAMES = {"reasons": "derivations", "speed_ups": "performance_flags"}
"""Names of fields in the run folders of version 0.1, and their names now."""

_COUNTS = (
    "nodes",
    "nproc_per_node",
    "world_size",
    "tensor_parallel",
    "batch_size",
    "micro_batch_size",
    "accumulation_steps",
    "total_steps",
)
_MAX_COUNT = 2**63 - 1

_SHOWN_SETTINGS = ("schedule", "lr_rule")
_SHOWN_DERIVATIONS = (
    "batch_size",
    "stages",
    "lr",
    "total_steps",
    "workers_per_rank",
    "pin_memory",
)
"""Texts by name that every plan has, and that are shown."""

_NOT_COMPARED = ("sources", "derivations", "notes", "settings", "samples_per_rank", "objectives")
"""Fields that ranks do not compare: explanations for the reader; the settings, which they compare
one by one; and the shares and the numbers of objectives, which follow from the batch size."""


@dataclass(frozen=True, kw_only=True)
class PlannedObjective:
    """The numbers of one of several objectives that follow from the recipe and the batch size."""

    name: str
    parameters: tuple[str, ...]
    """Patterns of the names of the parameters that it trains."""

    every: int
    """It takes its turn in one step of so many."""

    optimizer: str
    """The optimizer as text."""

    schedule: str
    """The schedule as text."""

    lr: float
    """Peak learning rate, scaled to the batch size of the first stage."""

    lr_start: float | None
    """Learning rate of the first step; None if only the run computes it, as with `plateau`."""

    lr_end: float | None
    """Learning rate of the last step, likewise."""

    lr_derivation: str
    """The arithmetic of the peak learning rate."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run that follows from its recipe and its ranks."""

    recipe: str
    """Name of the recipe."""

    nodes: int
    nproc_per_node: int
    """Ranks on each node."""

    world_size: int
    """Ranks on all nodes."""

    tensor_parallel: int = 1
    """Neighbouring ranks that share each layer and read the same samples."""

    device: Literal["cuda", "cpu"]
    strategy: str
    """Name of the strategy, one of `launcher.planning.strategy.STRATEGIES`."""

    backend: Backend
    """The implementation of the strategy; `local` is ddp on one rank, without a process group."""

    batch_size: int
    """Samples per optimizer step, over all ranks and accumulation steps, in the first stage."""

    stages: tuple[Stage, ...]
    """The stages of the run; a single one if the batch size is constant."""

    samples_per_rank: tuple[int, ...]
    """Samples that each rank takes of a full batch of the first stage, by rank. The ranks of a
    tensor-parallel group take the same samples."""

    micro_batch_size: int
    """Maximum number of samples that pass through the model at once on one rank."""

    accumulation_steps: int
    """Micro-batches of each rank per optimizer step, in the first stage."""

    virtual_ranks: int | None = None
    """Parts of each batch with random numbers and BatchNorm statistics of their own; None is one
    part per rank."""

    shard_size: int | None = None
    """Ranks that share the shards of a weight under FSDP; None is all of them, or that the strategy
    is another one."""

    exact: bool = False
    """Whether gradients are summed over virtual ranks in one fixed order."""

    lr: float
    """Peak learning rate, scaled to the batch size of the first stage."""

    lr_start: float | None
    """Learning rate of the first step; None if only the run computes it, as this and the next two
    are with torch_schedule and plateau."""

    lr_end: float | None
    """Learning rate of the last step."""

    lr_peak_step: int | None
    """The first step with the highest learning rate, counted from 1."""

    objectives: tuple[PlannedObjective, ...] = ()
    """The objectives in the order of their turns in a step; empty if the recipe has one loss. The
    numbers above on the learning rate are then those of objectives that give none of their own."""

    total_steps: int
    """Optimizer steps of the run; with `max_time` the upper limit, until the speed is known."""

    timed_steps: TimedSteps | None = None
    """The steps that `max_time` has set; None without it, or as long as the speed is unknown."""

    steps_per_epoch: int | None
    """Optimizer steps in an epoch with batches of the first stage, of which the last may be
    shorter; None if the number of training samples is unknown."""

    train_samples: int | None
    """Size of the training set; None if unknown."""

    evaluate_every: int | None
    """Steps between evaluations; None evaluates after each epoch."""

    seed: int
    precision: str
    performance_flags: tuple[str, ...]
    """The settings for speed or memory that are enabled."""

    workers_per_rank: Annotated[int, Affects.NODE]
    """DataLoader workers of each rank; 0 loads in the rank's own process."""

    prefetch_factor: Annotated[int | None, Affects.NODE]
    """Batches that each worker keeps ready; None without workers."""

    pin_memory: Annotated[bool, Affects.NODE]
    """Whether batches pass through page-locked memory."""

    threads_per_rank: Annotated[int, Affects.NODE]
    """CPU threads that each rank computes with."""

    machine: Annotated[Machine, Affects.NODE]
    """The machine that each node is taken to be."""

    settings: Mapping[str, Any]
    """The settings of the recipe with its overrides, as `Recipe.settings` returns them."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting came from, by its name."""

    derivations: Mapping[str, str] = field(default_factory=dict)
    """The arithmetic or the reason behind derived numbers, by their names."""

    notes: tuple[str, ...] = ()
    """Notes for the reader: what is unusual about this plan."""

    @property
    def data_ranks(self) -> int:
        """Return the number of ranks, or of tensor-parallel groups of ranks, that share a batch."""
        return self.world_size // self.tensor_parallel

    @property
    def samples_per_node(self) -> tuple[int, ...]:
        """Return the samples that each node's ranks take of a full batch of the first stage."""
        samples = self.samples_per_rank[:: self.tensor_parallel]
        groups = max(self.nproc_per_node // self.tensor_parallel, 1)
        first_groups = range(0, self.data_ranks, groups)
        return tuple(sum(samples[first : first + groups]) for first in first_groups)

    def cut(self, statistics: Statistics) -> BatchSplit:
        """Return how batches are cut into micro-batches, of virtual ranks if there are any.

        Args:
            statistics: The samples that the model's BatchNorm computes statistics over.
        """
        return BatchSplit(
            world_size=self.virtual_ranks or self.data_ranks,
            micro_batch_size=self.micro_batch_size,
            statistics=statistics,
        )

    @property
    def distribution(self) -> VirtualRanks:
        """Return how the parts of a batch are distributed over the ranks."""
        return distribute(
            self.virtual_ranks,
            self.data_ranks,
            self.strategy,
            exact=self.exact,
            shard_size=self.shard_size,
        )

    @property
    def sharding(self) -> Sharding | None:
        """Return the groups of ranks that share the shards of the weights; None without FSDP."""
        if not STRATEGIES[self.strategy].uses_fsdp:
            return None
        return Sharding(
            nodes=self.nodes,
            nproc_per_node=max(self.nproc_per_node // self.tensor_parallel, 1),
            size=self.shards,
            tensor_parallel=self.tensor_parallel,
        )

    @property
    def shards(self) -> int:
        """Return the number of parts into which the strategy cuts what it shards.

        With tensor-parallel groups, it cuts the part of each rank of a group.
        """
        return self.shard_size or self.data_ranks

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values that JSON and YAML can represent."""
        values = asdict(self)
        return values | {
            "samples_per_rank": list(self.samples_per_rank),
            "samples_per_node": list(self.samples_per_node),
            "stages": [asdict(stage) for stage in self.stages],
            "objectives": [asdict(each) for each in self.objectives],
            "performance_flags": list(self.performance_flags),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan that `to_dict` returned as `values`.

        Raises:
            RunDirError: The values are damaged, or an incompatible version of this package wrote
                them.
        """
        import msgspec

        try:
            plan: Plan = msgspec.convert(_renamed(values), cls)
        except (ValueError, OverflowError, msgspec.MsgspecError) as error:
            problem: str | None = printable_line(shortened(str(error), 200))
        else:
            problem = next(_inconsistencies(plan), None)
            if problem is None:
                return plan
        raise RunDirError(
            "The plan in the run folder is damaged, or an incompatible version of launcher wrote "
            f"it: {problem}."
        )

    def schedule_value_at(self, schedule: Schedule, step: int) -> ScheduleValue:
        """Return the value of `schedule` at a step, with its factor scaled to the step's batch.

        Args:
            schedule: The schedule of the recipe.
            step: The step, counted from 0.
        """
        span = self.total_steps if self.timed_steps is None else self.timed_steps.span(step)
        value = schedule.at(step, span)
        if len(self.stages) == 1:
            return value
        growth = growth_at(self.stages, step, self.settings["lr_rule"])
        return value._replace(factor=value.factor * growth)

    def check_world(self, world: World) -> None:
        """Refuse a world that is not the planned one.

        Raises:
            WorldError: The number of nodes, or of ranks per node, is not the planned one.
        """
        planned = (self.nodes, self.nproc_per_node)
        actual = (world.nodes, world.local_world_size)
        if actual != planned:
            raise WorldError(
                f"Planned for {self.world_size} ranks ({ranks_text(*planned)}); "
                f"found {world.world_size} ({ranks_text(*actual)}). Nothing was trained. Start as "
                "many ranks as were planned, or plan again for those that were found."
            )

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe whose settings are not the planned ones.

        Raises:
            WorldError: A setting of the recipe that this process built differs from the plan's.
        """
        built, planned = recipe.settings(), self.settings
        for name in sorted(built.keys() | planned.keys()):
            if built.get(name) != planned.get(name):
                raise WorldError(
                    f"The plan has {name}={planned.get(name)}, and the recipe {recipe.name} that "
                    f"this rank built has {name}={built.get(name)}. Nothing was trained. The "
                    "recipe's function must return the same settings in every process: they may "
                    "depend on its parameters, but not on a rank, an environment variable or the "
                    "time."
                )

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return the values in which this plan differs from the agreement of another rank.

        Args:
            other: What `agreement` returned on the other rank.

        Returns:
            (value here, value there) by name; empty if the ranks take the same steps.
        """
        agreement = self.agreement()
        return {
            name: (agreement.get(name), other.get(name))
            for name in sorted(agreement.keys() | other.keys())
            if agreement.get(name) != other.get(name)
        }

    def agreement(self) -> dict[str, Any]:
        """Return the numbers and settings that must be the same on every rank, by name.

        A setting takes precedence over a number of the same name.
        """
        effects = effects_of(Plan)
        numbers = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in _NOT_COMPARED and effects.get(item.name) is not Affects.NODE
        }
        of_node = settings_affecting(Affects.NODE)
        settings = {name: value for name, value in self.settings.items() if name not in of_node}
        timed_steps = None if self.timed_steps is None else asdict(self.timed_steps)
        stages = [asdict(stage) for stage in self.stages]
        return numbers | settings | {"stages": stages, "timed_steps": timed_steps}


def _inconsistencies(plan: Plan) -> Iterator[str]:
    """Yield why a plan of the right types cannot be one."""
    for name in _COUNTS:
        value = getattr(plan, name)
        if not 1 <= value <= _MAX_COUNT:
            yield f"{name} is {shortened(str(value), 40)}"
    if plan.world_size != plan.nodes * plan.nproc_per_node:
        yield f"world_size is not {ranks_text(plan.nodes, plan.nproc_per_node)}"
    if plan.tensor_parallel > 0 and plan.nproc_per_node % plan.tensor_parallel:
        yield f"tensor_parallel does not divide {plan.nproc_per_node} ranks per node"
    if len(plan.samples_per_rank) != plan.world_size:
        yield f"samples_per_rank has {len(plan.samples_per_rank):,} numbers"
    if plan.strategy not in STRATEGIES:
        yield f"{printable_line(shortened(plan.strategy, 40))} is not a strategy"
    if plan.shard_size is not None and (
        plan.shard_size < 1 or plan.data_ranks % plan.shard_size != 0
    ):
        yield f"shard_size is {shortened(str(plan.shard_size), 40)}"
    steps = [stage.first_step for stage in plan.stages]
    if steps[:1] != [0] or steps != sorted(steps):
        yield "the stages do not follow each other"
    for values, names in ((plan.settings, _SHOWN_SETTINGS), (plan.derivations, _SHOWN_DERIVATIONS)):
        yield from (f"{name} is missing" for name in names if not isinstance(values.get(name), str))


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_FORMER_NAMES.get(name, name): value for name, value in values.items()}
