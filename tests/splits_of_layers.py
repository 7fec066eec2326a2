"""Train language models whose layers are split over ranks, on one number of ranks after the other.

    python tests/splits_of_layers.py FOLDER

A program for test_tensor_parallel.py. Each run starts from scratch or from the checkpoint of an
earlier run, under another split.
"""

from __future__ import annotations

import gc
import hashlib
import importlib
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "recipes"))

from matrix import Trainer
from split import (
    build_dropping,
    build_llama,
    build_qwen,
    split_dropping,
    split_gpt,
    split_llama,
    split_partly,
    split_qwen,
)
from torch import nn
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import start_processes

from launcher import Recipe, RecipeError
from launcher.environment.world import find_world

_models: list[nn.Module] = []


def _kept() -> nn.Module:
    """Return a model with dropout, which `digest_of_whole` finds after it was trained."""
    _models.append(build_dropping())
    return _models[-1]


RECIPES: dict[str, Callable[[], Recipe]] = {
    "gpt": split_gpt,
    "llama": split_llama,
    "tied": lambda: split_llama(tied=True),
    "qwen": split_qwen,
    "partly": split_partly,
    "dropping": lambda: replace(split_dropping(), model=_kept),
}

PLAIN: tuple[tuple[str, Any], ...] = ()
TP = (("strategy", "fsdp"), ("tensor_parallel", 2))
FSDP = (("strategy", "fsdp"),)
RECOMPUTED = ("activation_checkpointing", True)


@dataclass(frozen=True)
class Split:
    """A run of a recipe on a number of ranks."""

    ranks: int
    recipe: str
    options: tuple[tuple[str, Any], ...]
    micro_batch_size: int | None = None
    source: Split | None = None
    """The run from whose checkpoint it is resumed."""

    @property
    def key(self) -> str:
        """Return the name of the run's folder."""
        options = "".join(f"-{name}={value}" for name, value in self.options)
        source = "" if self.source is None else f"-from-on{self.source.ranks}{self.source.key}"
        return f"{self.recipe}{options}-m{self.micro_batch_size}{source}"

    @property
    def folder(self) -> str:
        """Return the path of the run's folder."""
        return f"on{self.ranks}/{self.key}"

    def make(self, ranks: int) -> Recipe:
        """Return the recipe."""
        assert ranks == self.ranks
        options = dict(self.options)
        return replace(RECIPES[self.recipe](), micro_batch_size=self.micro_batch_size, **options)


DROPPING = Split(2, "dropping", FSDP)
"""The reference for dropout, which depends on the number of data ranks."""


REFUSED = Split(2, "partly", TP)
"""A run whose plan is wrong."""


def cases() -> Iterator[Split]:
    """Yield all runs, each after its source, grouped by the number of ranks."""
    alone = {name: Split(1, name, PLAIN) for name in ("gpt", "llama", "tied", "qwen")}
    yield from alone.values()
    pairs = [Split(2, name, TP, 5) for name in alone]
    yield from pairs
    yield Split(2, "gpt", TP, source=alone["gpt"])
    yield Split(2, "gpt", (*TP, RECOMPUTED, ("offload", "cpu")), 4)
    yield DROPPING
    yield REFUSED
    squares = [Split(4, name, TP, 2) for name in ("gpt", "llama")]
    yield from squares
    yield Split(4, "dropping", TP)
    yield Split(4, "llama", TP, source=pairs[1])
    yield Split(4, "gpt", FSDP, source=pairs[0])
    yield Split(2, "gpt", PLAIN, source=squares[0])
    yield Split(1, "llama", PLAIN, source=squares[1])


def digest_of_whole(model: nn.Module) -> str:
    """Return a digest of this rank's shards of the weights that no tensor-parallel group splits."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        names = parameter.device_mesh.mesh_dim_names or ()
        if "tp" not in names or parameter.placements[-1].is_replicate():
            digest.update(parameter.to_local().detach().numpy().tobytes())
    return digest.hexdigest()


def train_cases(rank: int, folder: Path, number: int, runs: list[Split]) -> None:
    """Train runs on the same number of ranks, as one of the ranks."""
    warnings.simplefilter("ignore")
    ranks = runs[0].ranks
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    world = replace(find_world(), store=folder / f"store{number}")
    train = Trainer(folder / f"on{ranks}", world)
    for run in runs:
        source = None if run.source is None else folder / run.source.folder
        try:
            train(run, run.key, source=source, saves=True)  # type: ignore[arg-type]
        except RecipeError as error:
            (folder / run.folder / f"refusal{rank}").write_text(str(error))
        if run.recipe == "dropping":
            (folder / run.folder / f"digest{rank}").write_text(digest_of_whole(_models[-1]))
    sys.stdout.flush()
    os._exit(0)


def main(folder: Path) -> None:
    """Train all runs."""
    importlib.import_module("launcher.engine.backends.fsdp")
    for build in (build_llama, build_qwen):  # their imports take as long as all runs
        build()
    gc.collect()
    gc.freeze()  # a collection in a rank visits and copies none of these objects
    groups: list[list[Split]] = []
    for run in cases():
        if not groups or groups[-1][0].ranks != run.ranks:
            groups.append([])
        groups[-1].append(run)
    for number, runs in enumerate(groups):
        start_processes(train_cases, (folder, number, runs), runs[0].ranks, start_method="fork")  # type: ignore[no-untyped-call]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
