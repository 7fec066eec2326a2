"""The plan of a run: every derived number, as one value.

Printing it is what `launcher plan` does; `launcher run` starts ranks that refuse to train if the
world that they find is another.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Annotated, Any, Literal

from launcher.environment.machine import Machine
from launcher.environment.world import World
from launcher.errors import RunDirError, WorldError
from launcher.planning.derivations import ranks_text
from launcher.planning.global_batch import BatchSplit, Statistics
from launcher.planning.stages import Stage, growth_at
from launcher.planning.strategy import Backend
from launcher.recipe.affects import Affects, effects_of
from launcher.recipe.recipe import Recipe, settings_affecting
from launcher.recipe.schedules import Schedule, ScheduleValue

_FORMER_NAMES = {"reasons": "derivations", "speed_ups": "performance_flags"}
"""Fields of plans in run folders of version 0.1, and what they are called now."""

_NOT_COMPARED = ("sources", "derivations", "notes", "settings", "samples_per_rank")
"""Fields that ranks do not compare as they are: explanations for the reader, the settings, which
are compared one by one, and shares, which follow from the batch size."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Every number of a run that follows from its recipe and the ranks it has."""

    recipe: str
    """The recipe's name."""

    nodes: int
    nproc_per_node: int
    """Ranks on each node."""

    world_size: int
    """Ranks in all."""

    device: Literal["cuda", "cpu"]
    strategy: str
    """What is sharded over the ranks, one of `launcher.planning.strategy.STRATEGIES`."""

    backend: Backend
    """What carries the strategy out; one process under ddp is `local`, without a process group."""

    batch_size: int
    """Samples per optimizer step, over all ranks and accumulation steps, in the first stage."""

    stages: tuple[Stage, ...]
    """Where the batch grows; one stage where it does not."""

    samples_per_rank: tuple[int, ...]
    """Samples of a full batch of the first stage that each rank takes."""

    micro_batch_size: int
    """The most samples that go through the model at once on one rank."""

    accumulation_steps: int
    """Micro-batches that each rank takes per optimizer step, in the first stage."""

    lr: float
    """Peak learning rate, scaled to the batch of the first stage."""

    lr_start: float
    lr_end: float
    lr_peak_step: int
    """The first step with the highest learning rate, counted from 1."""

    total_steps: int
    steps_per_epoch: int | None
    """Optimizer steps in a pass over the data with batches of the first stage, the last one
    possibly shorter; None where unknown."""

    train_samples: int | None
    evaluate_every: int | None
    """Steps between evaluations; None evaluates after each epoch."""

    seed: int
    precision: str
    performance_flags: tuple[str, ...]
    """The settings for speed or memory that are on."""

    workers_per_rank: Annotated[int, Affects.NODE]
    prefetch_factor: Annotated[int | None, Affects.NODE]
    pin_memory: Annotated[bool, Affects.NODE]
    threads_per_rank: Annotated[int, Affects.NODE]
    """CPU threads that each rank computes with."""

    machine: Annotated[Machine, Affects.NODE]
    """The machine that each node was taken to be."""

    settings: Mapping[str, Any]
    """The recipe's settings, overrides applied."""

    sources: Mapping[str, str] = field(default_factory=dict)
    """Where each setting came from."""

    derivations: Mapping[str, str] = field(default_factory=dict)
    """The arithmetic or the reason behind derived numbers, by name."""

    notes: tuple[str, ...] = ()
    """What a reader should know: what depends on the number of ranks, what is unusual."""

    @property
    def samples_per_node(self) -> tuple[int, ...]:
        """Samples of a full batch of the first stage that the ranks of each node take together."""
        own = self.nproc_per_node
        starts = range(0, self.world_size, own)
        return tuple(sum(self.samples_per_rank[start : start + own]) for start in starts)

    def cut(self, statistics: Statistics) -> BatchSplit:
        """Return how batches are cut for a model whose BatchNorm takes such statistics."""
        return BatchSplit(
            world_size=self.world_size,
            micro_batch_size=self.micro_batch_size,
            statistics=statistics,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain values that JSON and YAML can hold."""
        values = asdict(self)
        return values | {
            "samples_per_rank": list(self.samples_per_rank),
            "samples_per_node": list(self.samples_per_node),
            "stages": [asdict(stage) for stage in self.stages],
            "performance_flags": list(self.performance_flags),
            "notes": list(self.notes),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Plan:
        """Return the plan of which `values` are what `to_dict` returned.

        Raises:
            RunDirError: They are of another version of this package.
        """
        import msgspec

        try:
            return msgspec.convert(_renamed(values), cls)
        except msgspec.ValidationError as error:
            raise RunDirError(
                f"The plan in the run folder is not one of this version of launcher: {error}."
            ) from None

    def setting_at(self, schedule: Schedule, step: int) -> ScheduleValue:
        """Return what `schedule` says of a step, with the factor of its larger batch."""
        setting = schedule.at(step, self.total_steps)
        if len(self.stages) == 1:
            return setting
        growth = growth_at(self.stages, step, self.settings["lr_rule"])
        return setting._replace(factor=setting.factor * growth)

    def check_world(self, world: World) -> None:
        """Refuse a world other than the planned one.

        Raises:
            WorldError: The number of ranks, or of ranks per node, is not as planned.
        """
        planned = (self.nodes, self.nproc_per_node)
        found = (world.nodes, world.local_world_size)
        if found != planned:
            raise WorldError(
                f"Planned for {self.world_size} ranks ({ranks_text(*planned)}); "
                f"found {world.world_size} ({ranks_text(*found)}). Nothing was trained. Start "
                "as many ranks as were planned, or plan again for these."
            )

    def check_recipe(self, recipe: Recipe) -> None:
        """Refuse a recipe whose settings are not the planned ones.

        Raises:
            WorldError: This process has built the recipe with other settings.
        """
        built, planned = recipe.settings(), self.settings
        for name in sorted(built.keys() | planned.keys()):
            if built.get(name) != planned.get(name):
                raise WorldError(
                    f"The plan has {name}={planned.get(name)}, and recipe {recipe.name} has "
                    f"{name}={built.get(name)} where it was built to be trained. Nothing was "
                    "trained. Have the recipe's function return the same settings in every "
                    "process: they may depend on its parameters, but not on a rank, an "
                    "environment variable or the time."
                )

    def differences(self, other: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
        """Return what would make ranks with this plan and `other` take different steps."""
        own = self.agreement()
        return {
            name: (own.get(name), other.get(name))
            for name in sorted(own.keys() | other.keys())
            if own.get(name) != other.get(name)
        }

    def agreement(self) -> dict[str, Any]:
        """Return the values that must be the same on every rank."""
        effects = effects_of(Plan)
        numbers = {
            item.name: getattr(self, item.name)
            for item in fields(self)
            if item.name not in _NOT_COMPARED and effects.get(item.name) is not Affects.NODE
        }
        own = settings_affecting(Affects.NODE)
        shared = {name: value for name, value in self.settings.items() if name not in own}
        return numbers | shared | {"stages": [asdict(stage) for stage in self.stages]}


def _renamed(values: Mapping[str, Any]) -> dict[str, Any]:
    return {_FORMER_NAMES.get(name, name): value for name, value in values.items()}
