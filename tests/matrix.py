"""Train many configurations, on one number of ranks after the other.

A program for test_matrix.py, test_features.py, test_unused_parameters.py, test_resume.py,
test_hybrid_sharding.py, test_same_bits.py, test_small_states.py, test_averages.py,
test_evaluations.py and test_objectives.py. It forks the ranks, which train all their configurations
in one process group: imports and rendezvous are paid once.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import permutations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "recipes"))
sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))

import torch
from branches import branches
from clipped import clipped, make_scaled_sgd
from judged import whole
from methods import methods
from parts import norms, text
from splits import batch_norm, instance_norm
from torch import nn
from torch.multiprocessing.spawn import start_processes
from turns import turns
from worlds import tokens, worlds

from launcher import (
    Recipe,
    adamw,
    constant,
    ema,
    four_bits,
    make_plan,
    muon,
    read_machine,
    schedule_free,
    sgd,
    tail,
)
from launcher.engine.backends.base import Backend
from launcher.engine.process_group import join
from launcher.engine.ranks.output import Output
from launcher.engine.run import train_rank
from launcher.engine.training.finished_run import evaluate_weights
from launcher.engine.training.prediction import predict_samples
from launcher.environment.world import World, find_world
from launcher.planning.plan import Plan
from launcher.planning.strategy import STRATEGIES
from launcher.recipes.distill import distill
from launcher.recipes.gan import gan
from launcher.runs.job import RecipeSource, ResumeFrom
from launcher.runs.prediction_files import Prediction, merge
from launcher.runs.rundir import RunDir, create_run_dir
from launcher.runs.weight_choice import WeightChoice
from launcher.signals import StopRequest

RECIPES = {
    "worlds": worlds,
    "tokens": tokens,
    "batch_norm": batch_norm,
    "instance_norm": instance_norm,
    "branches": branches,
    "clipped": clipped,
    "methods": methods,
}
EXACT_RECIPES = {"norms": norms, "text": text, "gan": gan, "distill": distill, "turns": turns}


def build_deep() -> nn.Module:
    """Return a model of images (N, 1, 8, 8) with matrices of several sizes before its head."""
    return nn.Sequential(
        *(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 5, 3, padding=1), nn.ReLU()),
        *(nn.Flatten(), nn.Linear(5 * 64, 24), nn.ReLU(), nn.Linear(24, 37), nn.ReLU()),
        nn.Linear(37, 10),
    )


OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {
        "optimizer": sgd(momentum=0.9, weight_decay=1e-4, decay_1d=False),
        "lr": 0.1,
        "max_grad_norm": None,
    },
    "adamw": {"optimizer": adamw(weight_decay=0.1), "lr": 0.003, "max_grad_norm": 0.5},
    "muon": {
        "optimizer": muon(others=adamw(weight_decay=0.1, decay_1d=False)),
        "lr": 0.01,
        "max_grad_norm": None,
        "model": build_deep,
    },
    "scaled": {"optimizer": make_scaled_sgd, "lr": 0.05},
}


@dataclass(frozen=True)
class Case:
    """One configuration of a recipe."""

    recipe: str
    strategy: str = "ddp"
    accumulation: int = 1
    optimizer: str = "sgd"
    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        options = "".join(f"-{name}={value}" for name, value in self.options)
        return f"{self.recipe}-{self.strategy}-x{self.accumulation}-{self.optimizer}{options}"

    @property
    def steps(self) -> int:
        """Number of optimizer steps of the run."""
        return 13 if "batch_milestones" in dict(self.options) else 10

    def make(self, ranks: int) -> Recipe:
        """Return the recipe with the micro-batch size that gives the accumulation on `ranks`."""
        base = RECIPES[self.recipe]()
        assert base.batch_size is not None
        changes: dict[str, Any] = {
            "strategy": self.strategy,
            "micro_batch_size": -(-base.batch_size // (ranks * self.accumulation)),
            "epochs": 2,
            **OPTIMIZERS[self.optimizer],
            **dict(self.options),
        }
        return replace(base, **changes)


GROWING = (("epochs", 4), ("batch_milestones", (0.3, 0.7)), ("batch_gamma", 1.7))
"""Batches of 62, 105 and 179 samples; the second stage starts and ends within epochs."""


REFERENCES = (
    Case("worlds"),
    Case("worlds", optimizer="adamw"),
    Case("tokens", optimizer="adamw"),
    Case("worlds", optimizer="muon"),
    Case("worlds", options=GROWING),
)
"""Cases on one rank that the others are compared with."""


def matrix(ranks: int) -> Iterator[Case]:
    """Yield cases that pair strategies and ranks with workloads, accumulation and optimizers."""
    if ranks == 1:
        yield from REFERENCES
    for number, strategy in enumerate(STRATEGIES, start=ranks):
        if strategy == "fsdp" and ranks == 1:
            continue
        whole = Case("worlds", strategy, 1, "muon")
        if ranks > 3:  # where a step takes longest
            case = Case("tokens", strategy, 3, "adamw") if number % 2 else Case("worlds", strategy)
            cases = [case, whole]
        elif number % 2:
            cases = [
                Case("worlds", strategy),
                Case("worlds", strategy, 3, "adamw"),
                Case("tokens", strategy, 3, "adamw"),
                whole,
            ]
        else:
            cases = [
                Case("worlds", strategy, 1, "adamw"),
                Case("worlds", strategy, 3),
                Case("worlds", strategy, 3, options=GROWING),
                whole,
            ]
        yield from (case for case in cases if ranks > 1 or case not in REFERENCES)


DOUBLE = (("precision", "fp64"),)
SYNCED = ("sync_batchnorm", True)
ON_DEVICE = ("data_on_device", True)
RECOMPUTED = ("activation_checkpointing", True)


def features(ranks: int) -> Iterator[Case]:
    """Yield each setting for speed and memory under the strategies that support it."""
    strategies = {1: ("ddp",), 2: ("ddp", "fsdp", "zero2", "zero3")}
    for strategy in strategies.get(ranks, ("ddp", "zero3")):
        yield Case("worlds", strategy, options=(("precision", "bf16"),))
        yield Case("batch_norm", strategy, options=(SYNCED, ("channels_last", True)))
        if (ranks, strategy) != (3, "zero3"):  # ZeRO-3 has these on 2 ranks, and DDP on 3
            yield Case("worlds", strategy, options=(("precision", "fp16"),))
            yield Case("batch_norm", strategy, options=(SYNCED,))
        yield Case("batch_norm", strategy, options=(SYNCED, RECOMPUTED))
        if ranks == 2:
            if strategy != "zero3":  # it refuses what callbacks write
                yield Case("clipped", strategy, 3, "scaled")
            yield Case("methods", strategy)
            yield Case("instance_norm", strategy)
        if strategy in ("fsdp", "zero3"):
            yield Case("methods", strategy, 3, options=(ON_DEVICE,))
        if strategy in ("ddp", "fsdp"):
            yield Case("worlds", strategy, 3, options=DOUBLE)
            yield Case("batch_norm", strategy, options=(*DOUBLE, SYNCED))
        if strategy != "ddp":
            yield Case("worlds", strategy, 3, "adamw", options=(("offload", "cpu"),))
    if ranks == 1:
        yield Case("worlds")
        yield Case("worlds", optimizer="adamw")
        yield Case("clipped", optimizer="scaled")
        yield Case("methods")
        yield Case("instance_norm")
        yield Case("batch_norm")
        yield Case("worlds", options=DOUBLE)
        yield Case("batch_norm", options=DOUBLE)
        yield Case("methods", options=(ON_DEVICE,))
    elif ranks == 3:  # whose batches differ in size
        yield Case("batch_norm", "fsdp", options=(SYNCED, ("compile", True)))


def unused(ranks: int) -> Iterator[Case]:
    """Yield cases of a model in which each rank uses different parameters."""
    once = (("epochs", 1),)
    if ranks == 1:
        for optimizer in ("sgd", "adamw"):
            yield Case("branches", optimizer=optimizer, options=once)
            yield Case("branches", "zero1", 3, optimizer, options=once)
            yield Case("branches", "zero3", 3, optimizer, options=once)
        yield Case("branches", "zero3", 3, "adamw", options=(*once, ("offload", "cpu")))
        return
    for strategy in ("ddp", "fsdp", "zero1", "zero2"):
        yield Case("branches", strategy, 3, "adamw", options=once)
        if ranks == 2:
            yield Case("branches", strategy, 1, "adamw", options=once)
            yield Case("branches", strategy, 1, "sgd", options=once)


SOURCES = (
    Case("batch_norm", "ddp", 1, "adamw"),
    Case("worlds", "ddp", 3, "adamw"),
    Case("worlds", "fsdp", 1, "sgd"),
    Case("worlds", "zero1", 1, "adamw"),
    Case("worlds", "zero2", 3, "sgd"),
    Case("worlds", "zero3", 1, "adamw"),
    Case("worlds", "zero2", 1, "adamw", options=(("offload", "cpu"),)),
    Case("worlds", "ddp", 1, "sgd", options=(("precision", "fp16"),)),
    Case("worlds", "ddp", 1, "sgd", options=GROWING),
)
"""Cases that are resumed: trained on `SOURCE_RANKS`, with a checkpoint within the second epoch."""

EVALUATED = (
    *(
        Case("worlds", strategy, 1, optimizer, options=(*options, ("evaluate_every", 1)))
        for strategy in STRATEGIES
        for optimizer, options in (
            ("sgd", ()),
            ("adamw", () if strategy == "ddp" else (("offload", "cpu"),)),
        )
    ),
    *(
        Case("worlds", strategy, 1, "sgd", options=(("precision", "fp16"), ("evaluate_every", 1)))
        for strategy in ("fsdp", "zero2", "zero3")
    ),
)
"""Cases that are resumed from a checkpoint after several evaluations.

After a forward without a backward, sharded weights and optimizer state may lie elsewhere in memory.
"""

WHOLE_SOURCES = tuple(Case("worlds", strategy, 1, "muon") for strategy in ("ddp", "zero2", "zero3"))
"""Cases with whole matrices, each of which is resumed under the others of these strategies."""

SOURCE_RANKS = 2
RESUMED_FROM = 7


def resumed(ranks: int) -> Iterator[tuple[Case, Case]]:
    """Yield pairs of a source and the configuration with which it is resumed."""
    if ranks == SOURCE_RANKS:
        yield from ((source, source) for source in (*SOURCES, *WHOLE_SOURCES, *EVALUATED))
    plain = SOURCES[1]
    for strategy in STRATEGIES:
        if (strategy, ranks) != ("fsdp", 1):
            yield plain, replace(plain, strategy=strategy, accumulation=1)
    if ranks in (1, 3):
        for source in (*SOURCES[2:6], SOURCES[-1]):
            yield source, replace(source, strategy="ddp")
        yield from list(permutations(WHOLE_SOURCES, 2))[ranks // 2 :: 2]
    for source in EVALUATED:
        if ranks == 1:
            options = tuple(option for option in source.options if option[0] != "offload")
            yield source, replace(source, strategy="ddp", options=options)
        elif ranks == 3:
            yield source, source


PAIRS = ("shard", 2)
UNSHARDED = ("accumulate_unsharded", True)
KEPT = ("reshard_after_forward", False)
CLIPPED = ("max_grad_norm", 0.01)
ONCE = ("epochs", 1)

HYBRID_SOURCE = Case("worlds", "fsdp", 3, "adamw", options=(PAIRS,))
"""Two copies of the model on two ranks each; it is trained on 4 ranks and resumed on others."""

HYBRID_REFERENCES = (
    *(Case("worlds", optimizer=name) for name in ("sgd", "adamw")),
    Case("worlds", optimizer="sgd", options=(CLIPPED,)),
    Case("tokens", optimizer="adamw"),
    Case("batch_norm", options=(SYNCED,)),
    Case("branches", optimizer="adamw", options=(ONCE,)),
)
HYBRID = (
    *(Case("worlds", "fsdp", accumulation, "sgd", options=(PAIRS,)) for accumulation in (1, 3)),
    Case("worlds", "fsdp", 1, "adamw", options=(PAIRS,)),
    HYBRID_SOURCE,
    Case("worlds", "fsdp", 3, "sgd", options=(CLIPPED, PAIRS)),
    Case("worlds", "fsdp", 3, "adamw", options=(PAIRS, UNSHARDED, ("offload", "cpu"))),
    Case("tokens", "fsdp", 3, "adamw", options=(PAIRS, UNSHARDED, KEPT)),
    Case("tokens", "fsdp", 3, "adamw", options=(UNSHARDED,)),
    Case("batch_norm", "fsdp", options=(SYNCED, PAIRS, ("prefetch_blocks", 1))),
    Case("batch_norm", "fsdp", options=(SYNCED, KEPT, ("prefetch_blocks", 2))),
    Case("branches", "fsdp", 3, "adamw", options=(ONCE, PAIRS)),
    Case("branches", "fsdp", 3, "adamw", options=(ONCE, UNSHARDED)),
    Case("worlds", "fsdp", 3, "sgd", options=(PAIRS, ("reduce_dtype", "bf16"))),
    Case("worlds", "fsdp", 3, "sgd", options=(PAIRS, ("noise_scale", True))),
)
HYBRID_WORLDS = (1, 2, 4, 3, 1)
"""Numbers of ranks, one after the other; the last two resume what 4 ranks have saved."""

_SHARDED = replace(HYBRID_SOURCE, options=())
_ALONE = replace(_SHARDED, strategy="ddp", accumulation=1)
_RESUMED_ON = {
    1: (_ALONE,),
    3: (_SHARDED, replace(_SHARDED, strategy="zero2"), replace(_SHARDED, strategy="zero3")),
}


@dataclass(frozen=True)
class Source:
    """A case from whose checkpoint another one is resumed."""

    ranks: int
    case: Case

    @property
    def folder(self) -> str:
        return f"on{self.ranks}/{self.case.key}"

    @property
    def title(self) -> str:
        return f"from{self.ranks}-{self.case.strategy}"


SHARDED_SOURCE = Source(2, _SHARDED)
HYBRID_SOURCES = (
    Source(1, _ALONE),
    SHARDED_SOURCE,
    Source(2, replace(_SHARDED, strategy="zero3")),
    Source(4, HYBRID_SOURCE),
)


def hybrid(ranks: int, trained: Container[int]) -> Iterator[tuple[Case, Source | None]]:
    """Yield cases with the source from whose checkpoint they are resumed, if any.

    Args:
        ranks: The number of ranks.
        trained: The numbers of ranks that have been trained on before.
    """
    if 4 in trained:
        yield from ((case, HYBRID_SOURCES[-1]) for case in _RESUMED_ON[ranks])
    elif ranks == 4:
        yield from ((case, None) for case in HYBRID)
        yield from ((HYBRID_SOURCE, source) for source in HYBRID_SOURCES[:-1])
    else:
        cases = [source.case for source in HYBRID_SOURCES if source.ranks == ranks]
        references = HYBRID_REFERENCES if ranks == 1 else ()
        yield from ((case, None) for case in dict.fromkeys((*references, *cases)))


BITS_RESUMED_FROM = 8
BITS_EPOCHS = 2


@dataclass(frozen=True)
class BitsCase:
    """One configuration of a recipe with virtual ranks, which is trained for about 10 steps."""

    recipe: str
    strategy: str = "ddp"
    options: tuple[tuple[str, Any], ...] = ()
    is_resumed: bool = False
    shard: int | str = "node"
    name: str = ""
    """What it is called in the name of the run's folder; by default recipe and options."""

    saved_at: int = BITS_RESUMED_FROM
    """Steps after which a checkpoint is saved."""

    @property
    def key(self) -> str:
        """Return the name of the run's folder."""
        groups = "" if self.shard == "node" else f"-shard={self.shard}"
        return f"{self.workload}-{self.strategy}{groups}"

    @property
    def source(self) -> BitsCase:
        """Return the case on `SOURCE_RANKS` ranks from whose checkpoint it is resumed."""
        return replace(self, shard="node")

    @property
    def workload(self) -> str:
        """Return what is trained, without the strategy."""
        return self.name or "-".join(
            [self.recipe, *(f"{name}={value}" for name, value in self.options)]
        )

    def make(self, ranks: int) -> Recipe:
        """Return the recipe, which is the same on any number of ranks."""
        del ranks
        changes: dict[str, Any] = {"strategy": self.strategy, "shard": self.shard}
        changes |= {"epochs": BITS_EPOCHS} | dict(self.options)
        return replace(EXACT_RECIPES[self.recipe](), **changes)


WORKLOADS: tuple[tuple[str, tuple[tuple[str, Any], ...]], ...] = (
    ("norms", ()),
    ("text", ()),
    ("norms", (("optimizer", adamw(weight_decay=0.1)), ("lr", 0.003), ("max_grad_norm", 0.5))),
    ("norms", (("precision", "bf16"),)),
    ("text", (("precision", "bf16"),)),
    ("norms", (("precision", "fp16"),)),
    ("text", (("precision", "fp16"),)),
    ("norms", (("micro_batch_size", 3),)),
    ("text", (("micro_batch_size", 4), ("activation_checkpointing", True))),
    ("norms", (("batch_milestones", (0.6,)), ("noise_scale", True), ("epochs", 4))),
)
"""What is trained to the same bits: recipes with further settings."""

BITS_WORLDS = (SOURCE_RANKS, 1, 3, 4, 5, 8)


_ALL = tuple(range(len(WORKLOADS)))
_BITS = {
    "ddp": {1: _ALL, 2: _ALL, 3: (0, 1, 7), 4: (0, 5), 5: (1, 2), 8: (0,)},
    "fsdp": {2: (0, 1, 4, 6, 8), 3: (4, 6), 4: (1,), 5: (7,), 8: (0,)},
}
"""Indices of the workloads that are trained under each strategy, by the number of ranks.

benchmarks/same_bits.py trains all of them on every number of ranks. On CPUs, FSDP in mixed
precision has no BatchNorm.
"""

_RESUMED = {(1, 1, "ddp"), (3, 0, "ddp"), (4, 1, "fsdp"), (8, 0, "fsdp")}
"""(Ranks, index of the workload, strategy) of cases that are also resumed from the checkpoint of
`SOURCE_RANKS` ranks."""


_UNEVEN = (("virtual_ranks", 7),)
_GROUPED = (
    BitsCase("norms", "fsdp", is_resumed=True, shard=2),
    BitsCase("text", "fsdp", _UNEVEN, shard=2),  # groups of 4 and 3 virtual ranks
)
"""Cases with two copies of the model, on 4 ranks."""


def bits(ranks: int) -> Iterator[BitsCase]:
    """Yield workloads under the strategies that have exact sums."""
    for strategy, of_ranks in _BITS.items():
        for number in of_ranks.get(ranks, ()):
            recipe, options = WORKLOADS[number]
            is_resumed = (ranks, number, strategy) in _RESUMED
            yield BitsCase(recipe, strategy, options, is_resumed)
    if ranks == 1:
        yield BitsCase("text", options=_UNEVEN)
    if ranks == 4:
        yield from _GROUPED


def build_wide() -> nn.Module:
    """Return a model from words to logits with weights that are large enough for 8 bits."""
    return nn.Sequential(nn.Embedding(50, 96), nn.Linear(96, 300), nn.ReLU(), nn.Linear(300, 50))


def build_frozen() -> nn.Module:
    """Return a model from words to logits with a layer frozen in 4 bits, and another as it is."""
    embedding, head = nn.Embedding(50, 96), nn.Linear(64, 50)
    embedding.requires_grad_(False)
    return nn.Sequential(embedding, four_bits(nn.Linear(96, 64)), nn.ReLU(), head)


SMALL: dict[str, dict[str, Any]] = {
    "bf16": {"optimizer": adamw(weight_decay=0.1, state_dtype="bf16")},
    "int8": {"optimizer": adamw(weight_decay=0.1, state_dtype="int8"), "model": build_wide},
    "free": {"optimizer": schedule_free(), "schedule": constant(), "evaluate_every": 3},
    "frozen": {"model": build_frozen},
    "muon": {"optimizer": muon(others=adamw(weight_decay=0.1, decay_1d=False))},
    "kernels": {"optimizer": muon(adjust="original", others=sgd(), others_lr=2.5), "lr": 0.04},
    "weights": {
        "optimizer": muon(others=adamw(state_dtype="bf16")),
        "param_dtype": "bf16",
        "precision": "bf16",
    },
}
"""Optimizers with small states, or of whole matrices, and weights in bf16."""

SMALL_WORLDS = (SOURCE_RANKS, 1, 3, 4)


ROUNDED = ("bf16", "muon", "weights")
"""Those that are also trained with sums that round differently."""

WHOLE = ("muon", "kernels")
"""Those that need whole matrices, which are also trained on 4 ranks."""


def small(ranks: int) -> Iterator[BitsCase]:
    """Yield each of these optimizers with exact sums, and some without."""
    for name, settings in SMALL.items():
        if ranks > 3 and name not in WHOLE:
            continue
        recipe = "norms" if name == "kernels" else "text"
        options = (*settings.items(), ("epochs", 2), ("virtual_ranks", 4))
        keeps_bf16 = "param_dtype" in settings
        # Exact sums under ddp are in the dtype of the weights.
        strategies = {1: ["ddp"], 2: ["fsdp"]}.get(
            ranks, ["fsdp"] if keeps_bf16 else ["ddp", "fsdp"]
        )
        for strategy in strategies:
            is_resumed = (ranks, strategy) == (3, "fsdp")
            yield BitsCase(recipe, strategy, options, is_resumed, name=f"exact-{name}", saved_at=6)
        if name in ROUNDED and ranks in (1, 3):
            inexact = (*options, ("exact", False))
            strategy = "ddp" if keeps_bf16 or ranks == 1 else "fsdp"
            yield BitsCase("text", strategy, inexact, name=f"rounded-{name}", saved_at=6)


_EMA = (("averaging", ema(0.8)), ("evaluate_every", 3))
AVERAGED = {
    strategy: Case("worlds", strategy, 1, "adamw", options=_EMA)
    for strategy in ("ddp", "zero1", "zero3")
}
"""An average of weights under strategies that `evaluations` leaves out, and in one process."""

AVERAGED_NORMS = Case("batch_norm", options=(SYNCED, ("averaging", tail(start=0.2))))
AVERAGED_BITS = {
    strategy: BitsCase("norms", strategy, (*_EMA, ("epochs", 2)), name="averaged", saved_at=6)
    for strategy in ("ddp", "fsdp")
}
"""An average of weights and BatchNorm's statistics, equal to the bit on any number of ranks."""

AVERAGED_WORLDS = (SOURCE_RANKS, 1, 3)


def averaged(ranks: int) -> Iterator[tuple[Case | BitsCase, Case | BitsCase | None]]:
    """Yield cases with averaged weights, each with the case from whose checkpoint it is resumed."""
    if ranks == 1:
        yield AVERAGED["ddp"], None
        yield replace(AVERAGED["ddp"], accumulation=3), AVERAGED["zero1"]
        yield AVERAGED_BITS["ddp"], None
        yield AVERAGED_NORMS, None
    elif ranks == SOURCE_RANKS:
        yield AVERAGED["zero1"], None
        yield AVERAGED["zero3"], None
        yield from ((case, None) for case in AVERAGED_BITS.values())
    else:
        yield AVERAGED["zero1"], AVERAGED["zero3"]
        yield AVERAGED["zero3"], AVERAGED["zero1"]
        yield AVERAGED_BITS["fsdp"], AVERAGED_BITS["ddp"]
        yield AVERAGED_BITS["ddp"], AVERAGED_BITS["fsdp"]
        yield AVERAGED_NORMS, None


JUDGED: dict[str, dict[str, Any]] = {
    "": {},
    "exact": {"virtual_ranks": 3, "exact": True},
    "parted": {"virtual_ranks": 3},
    "split": {"tensor_parallel": 2},
}
"""Settings of the recipe with everything around the loop, by name."""

JUDGED_STEPS = {"best": 9, "saved": 13, "last": 18}
"""Steps of its best checkpoint, of the one that it is resumed from, and of its early end."""


@dataclass(frozen=True)
class JudgedCase:
    """One configuration of the recipe with everything around the loop."""

    strategy: str = "ddp"
    name: str = ""
    """One of `JUDGED`."""

    resumed_from: str = ""
    """The strategy whose checkpoint of `SOURCE_RANKS` ranks it is also resumed from, if any."""

    saved_at: int = JUDGED_STEPS["saved"]

    @property
    def key(self) -> str:
        """Return the name of the run's folder."""
        return f"{self.strategy}-{self.name}" if self.name else self.strategy

    @property
    def is_resumed(self) -> bool:
        """Whether it is also resumed from a checkpoint."""
        return bool(self.resumed_from)

    @property
    def source(self) -> JudgedCase:
        """Return the case on `SOURCE_RANKS` ranks from whose checkpoint it is resumed."""
        return replace(self, strategy=self.resumed_from)

    def make(self, ranks: int) -> Recipe:
        """Return the recipe, which is the same on any number of ranks."""
        del ranks
        return replace(whole(), strategy=self.strategy, **JUDGED[self.name])  # type: ignore[arg-type]


_JUDGED_ON = {
    1: (JudgedCase(), JudgedCase("ddp", "exact")),
    2: (
        JudgedCase(),
        JudgedCase("zero2"),
        JudgedCase("ddp", "parted"),
        JudgedCase("fsdp", "split"),
        JudgedCase("fsdp", "exact"),
    ),
    3: (
        JudgedCase(resumed_from="zero2"),
        JudgedCase("fsdp", resumed_from="ddp"),
        JudgedCase("zero2", resumed_from="ddp"),
        JudgedCase("ddp", "exact"),
    ),
}


def evaluations(ranks: int) -> Iterator[JudgedCase]:
    """Yield configurations in which everything around the loop is compared.

    benchmarks/around_the_loop.py compares every strategy on every number of ranks.
    """
    yield from _JUDGED_ON[ranks]


OBJECTIVES_WORLDS = (SOURCE_RANKS, 1, 3)

_FEW = (("epochs", None), ("steps", 10), ("evaluate_every", 4), ("record_samples", True))
_OBJECTIVES: dict[str, tuple[str, tuple[tuple[str, Any], ...]]] = {
    "gan": ("gan", _FEW),
    "gan-micro": ("gan", (*_FEW, ("micro_batch_size", 5))),
    "gan-bf16": ("gan", (*_FEW, ("precision", "bf16"))),
    "distill": ("distill", _FEW),
    "turns-fp16": ("turns", (("epochs", 3), ("precision", "fp16"))),
    "turns-exact": ("turns", (("epochs", 3), ("exact", True))),
}
"""Recipes with several objectives, and settings."""

EVALUATED_OBJECTIVES = ("gan", "turns-exact")
"""Those whose final weights are evaluated and predict, on 1 and 3 ranks."""

_OBJECTIVES_ON: dict[int, dict[str, tuple[str, ...]]] = {
    1: {"ddp": ("gan", "gan-bf16", "distill", "turns-fp16", "turns-exact")},
    2: {
        "ddp": ("gan", "turns-fp16", "turns-exact"),
        "fsdp": ("gan-bf16", "distill", "turns-exact"),
    },
    3: {"ddp": ("distill", "gan-micro"), "fsdp": ("gan", "turns-exact")},
}


def objectives(ranks: int) -> Iterator[BitsCase]:
    """Yield recipes with several objectives under the strategies that train them.

    Those that are resumed start from the checkpoint of `SOURCE_RANKS` ranks under the strategy.
    """
    for strategy, names in _OBJECTIVES_ON[ranks].items():
        for name in names:
            recipe, options = _OBJECTIVES[name]
            is_resumed = (ranks, name) in {(1, "turns-fp16"), (3, "turns-exact")}
            yield BitsCase(recipe, strategy, options, is_resumed, name=name, saved_at=5)


SUITES = {"matrix": matrix, "features": features, "unused": unused}

BITS_SUITES: dict[str, Callable[[int], Iterator[BitsCase | JudgedCase]]] = {
    "bits": bits,
    "small": small,
    "evaluations": evaluations,
    "objectives": objectives,
}


_NO_SOURCE = RecipeSource(recipe="")


class Trainer:
    """Trains cases one after the other in one process group."""

    def __init__(self, folder: Path, world: World) -> None:
        self.world = world
        self.folder = folder
        self._output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
        self._backends: list[Any] = []  # keep alive the process group that all cases share

    def __call__(
        self,
        case: Case | BitsCase | JudgedCase,
        name: str,
        *,
        source: Path | None = None,
        saves: bool = False,
    ) -> None:
        """Train a case into a folder called `name`, resumed from a copy of `source` if given."""
        resumed_from = getattr(case, "saved_at", RESUMED_FROM)
        recipe = replace(
            case.make(self.world.world_size), checkpoint_every=resumed_from, keep_checkpoints=2
        )
        plan = make_plan(recipe, read_machine(), nproc_per_node=self.world.world_size)

        def make_run_dir() -> RunDir:
            if source is None:
                return create_run_dir(self.folder / name, "case")
            shutil.copytree(source, self.folder / name)
            return RunDir(self.folder / name)

        backend, run_dir = join(recipe, plan, self.world, make_run_dir)
        if torch.distributed.is_initialized():
            self.world = replace(self.world, store=None)  # later cases use the same group
        start = ResumeFrom(step=resumed_from) if source is not None else None
        stop = StopRequest() if saves else None
        train_rank(recipe, plan, backend, run_dir, self._output, start=start, stop=stop)
        self._backends.append(backend)

    def evaluate(self, case: Case | BitsCase | JudgedCase, *choices: WeightChoice) -> None:
        """Evaluate weights of a case again."""
        run_dir, measured = RunDir(self.folder / case.key), {}
        for weights in choices:
            recipe, plan, backend = self._join(case, run_dir)
            measured[weights.name] = evaluate_weights(
                recipe, plan, backend, weights, source=_NO_SOURCE, report_phase=lambda *_: None
            )
        if backend.rank == 0:
            (run_dir.path / "evaluated.json").write_text(json.dumps(measured))

    def predict(self, case: BitsCase | JudgedCase, name: str, weights: WeightChoice) -> None:
        """Predict the evaluation set `name` with the weights of a run."""
        run_dir = RunDir(self.folder / case.key)
        recipe, plan, backend = self._join(case, run_dir)
        parts = run_dir.path / "parts"
        prediction = Prediction(input=name, is_file=False, parts=parts, format="jsonl")
        if backend.rank == 0:
            parts.mkdir()
        backend.broadcast(None)
        predict_samples(
            recipe,
            plan,
            backend,
            weights,
            prediction,
            source=_NO_SOURCE,
            report_phase=lambda *_: None,
        )
        backend.broadcast(None)
        if backend.rank == 0:
            merge(prediction, plan.world_size, run_dir.path / "predictions.jsonl")

    def _join(
        self, case: Case | BitsCase | JudgedCase, run_dir: RunDir
    ) -> tuple[Recipe, Plan, Backend]:
        recipe = replace(case.make(self.world.world_size), averaging=None)
        plan = make_plan(recipe, read_machine(), nproc_per_node=self.world.world_size)
        backend, _ = join(recipe, plan, self.world, lambda: run_dir)
        self._backends.append(backend)
        return recipe, plan, backend


def train_suite(suite: str, folder: Path, worlds: Sequence[int]) -> None:
    """Train each case of a suite into a folder of its own, such as on2/... with two ranks."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    for module in ("accelerate", "fsdp", "deepspeed"):
        importlib.import_module(f"launcher.engine.backends.{module}")
    if suite == "evaluations":
        importlib.import_module("torchmetrics")
        importlib.import_module("sklearn.metrics")
    gc.collect()
    gc.freeze()  # a collection in a rank visits and copies none of these objects
    for index, ranks in enumerate(worlds):
        arguments = suite, folder, ranks, worlds[:index]
        start_processes(train_cases, arguments, ranks, start_method="fork")  # type: ignore[no-untyped-call]


def train_cases(rank: int, suite: str, folder: Path, ranks: int, before: Sequence[int]) -> None:
    """Train the cases of a suite for this number of ranks, as one of the ranks.

    Args:
        rank: The rank.
        suite: The name of the suite.
        folder: The folder of all runs.
        ranks: The number of ranks.
        before: The numbers of ranks that have been trained on before.
    """
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    world = replace(find_world(), store=folder / f"store{len(before)}")
    train = Trainer(folder / f"on{ranks}", world)
    if suite == "resume":
        _train_resumed(train, folder, ranks)
    elif suite == "averaged":
        for case, source in averaged(ranks):
            path = None if source is None else folder / f"on{SOURCE_RANKS}" / source.key
            train(case, case.key, source=path, saves=True)
            if ranks == 3:
                run_dir = RunDir(train.folder / case.key)
                kinds = (True, False) if isinstance(case, BitsCase) else (case.strategy == "zero1",)
                choices = [WeightChoice(run_dir=run_dir, step=10, is_final=each) for each in kinds]
                train.evaluate(case, *choices)
    elif suite == "hybrid":
        _train_hybrid(train, folder, ranks, before)
    elif suite in BITS_SUITES:
        _train_bits(train, folder, BITS_SUITES[suite](ranks))
    else:
        for case in SUITES[suite](ranks):
            train(case, case.key)
    sys.stdout.flush()
    os._exit(0)


def _train_resumed(train: Trainer, folder: Path, ranks: int) -> None:
    source_folder = folder / f"on{SOURCE_RANKS}"
    if ranks == SOURCE_RANKS:
        for source in (*SOURCES, *WHOLE_SOURCES, *EVALUATED):
            train(source, source.key, saves=True)
    for source, case in resumed(ranks):
        train(case, f"{source.key}-as-{case.key}", source=source_folder / source.key)


def _train_hybrid(train: Trainer, folder: Path, ranks: int, before: Sequence[int]) -> None:
    for case, source in hybrid(ranks, before):
        if source is None:
            train(case, case.key, saves=Source(ranks, case) in HYBRID_SOURCES)
        else:
            train(case, f"{case.key}-{source.title}", source=folder / source.folder)


def _train_bits(train: Trainer, folder: Path, cases: Iterable[BitsCase | JudgedCase]) -> None:
    for case in cases:
        train(case, case.key, saves=True)
        if case.is_resumed:
            source = folder / f"on{SOURCE_RANKS}" / case.source.key
            train(case, f"{case.key}-resumed", source=source, saves=True)
        if isinstance(case, JudgedCase):
            run_dir = RunDir(train.folder / case.key)
            is_final = case.strategy != "zero2"
            step = JUDGED_STEPS["best" if is_final else "last"]
            train.evaluate(case, WeightChoice(run_dir=run_dir, step=step, is_final=is_final))
            first = RunDir(folder / f"on{SOURCE_RANKS}/ddp")
            best = WeightChoice(run_dir=first, step=JUDGED_STEPS["best"], is_final=True)
            train.predict(case, "dev", best)
        elif case.name in EVALUATED_OBJECTIVES and train.world.world_size != SOURCE_RANKS:
            run_dir = RunDir(train.folder / case.key)
            last = WeightChoice(run_dir=run_dir, step=10, is_final=True)
            train.evaluate(case, last)
            train.predict(case, "evaluation", last)


if __name__ == "__main__":
    train_suite(sys.argv[1], Path.cwd(), [int(text) for text in sys.argv[2:]])
