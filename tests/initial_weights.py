"""Builds and trains a model in several ways, and saves its initial and its final weights.

A program for test_initial_weights.py. It forks the ranks, which build and train one case after the
other in one process group.
"""

from __future__ import annotations

import functools
import json
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent / "recipes"))

from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.spawn import start_processes
from tower import build_tower, tower

from launcher import Recipe, make_plan, read_machine
from launcher.engine.data.randomness import seed_all
from launcher.engine.probes.measuring import MetricsCollector
from launcher.engine.process_group import join
from launcher.engine.training.build import build_context
from launcher.engine.training.loop import train
from launcher.environment.world import find_world
from launcher.recipe.recipe import StrategyName
from launcher.runs.rundir import create_run_dir


@dataclass(frozen=True)
class Case:
    """A way to build a model under a strategy."""

    strategy: StrategyName
    way: str = "recorded"
    """`recorded`; `in_turns`, by a model function that cannot be recorded; or `read`, from a folder
    of safetensors files."""

    options: tuple[tuple[str, Any], ...] = ()

    @property
    def key(self) -> str:
        return "-".join([self.strategy, self.way, *(f"{k}={v}" for k, v in self.options)])

    def make(self, folder: Path) -> Recipe:
        recipe = tower(reads=self.way == "in_turns")
        weights = str(folder / "weights") if self.way == "read" else None
        return replace(recipe, strategy=self.strategy, weights=weights, **dict(self.options))


def cases(ranks: int) -> list[Case]:
    """Return the cases for a number of ranks; those on one rank are the references."""
    ways = ("recorded", "in_turns", "read")
    sharded: tuple[StrategyName, ...] = ("fsdp", "zero3")
    if ranks == 1:
        return [*(Case("ddp", way) for way in ways), Case("ddp", options=(("precision", "fp64"),))]
    return [
        *(Case(strategy, way) for strategy in sharded for way in ways),
        Case("ddp", "read"),
        Case("fsdp", options=(("precision", "fp64"),)),
        Case("fsdp", options=(("offload", "cpu"), ("activation_checkpointing", True))),
        Case("zero3", options=(("offload", "cpu"),)),
    ]


def write_folder(folder: Path) -> None:
    """Write other weights for the model in two files, without the names of shared weights."""
    folder.mkdir()
    seed_all(77)
    model = build_tower()
    tensors = {name: value + 0.01 for name, value in model.named_parameters()}
    tensors |= {name: value + 0.01 for name, value in model.named_buffers() if name != "places"}
    names = sorted(tensors)
    files = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, of_file in files.items():
        save_file({name: tensors[name].detach() for name in of_file}, folder / file)
    index = {"weight_map": {name: file for file, of_file in files.items() for name in of_file}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def run_case(case: Case, folder: Path, ranks: int, world: Any) -> Any:
    """Build the model, save its initial weights, train, and save the final ones (collective)."""
    recipe = case.make(folder)
    plan = make_plan(recipe, read_machine(), nproc_per_node=ranks)
    make_run_dir = functools.partial(create_run_dir, folder / f"{ranks}" / case.key, "case")
    backend, run_dir = join(recipe, plan, world, make_run_dir)
    context = build_context(recipe, plan, backend, last_step=4, evaluates=False)
    initial = _copied(dict(backend.weights(context.model)))
    shift: Any = backend.unwrap(context.model).shift
    train(context, MetricsCollector(None), last_step=4)
    final = dict(backend.weights(context.model))
    if backend.rank == 0:
        save_file({**initial, "shift": shift}, run_dir.path / "initial")
        save_file(_copied(final), run_dir.path / "final")
    return backend


def _copied(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().clone().contiguous() for name, value in weights.items()}


def run_rank(rank: int, folder: Path, ranks: int) -> None:
    """Run all cases, as one of the ranks."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", ranks)):
        os.environ |= {name: str(value), f"LOCAL_{name}": str(value)}
    world = replace(find_world(), store=folder / f"store-{ranks}")
    if ranks == 1:  # the first run; not before the fork, which would copy threads of torch
        write_folder(folder / "weights")
    backends = []
    for case in cases(ranks):
        backends.append(run_case(case, folder, ranks, world))
        world = replace(world, store=None)  # later cases use the same group
    sys.stdout.flush()
    backends[-1].wait_for_all("saved")
    os._exit(0)


if __name__ == "__main__":
    os.environ["DS_ACCELERATOR"] = "cpu"
    num_ranks = int(sys.argv[1])
    start_processes(  # type: ignore[no-untyped-call]
        run_rank, (Path.cwd(), num_ranks), num_ranks, start_method="fork"
    )
