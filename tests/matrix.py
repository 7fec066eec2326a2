"""Every configuration of the matrix, one after the other, on the ranks that this is started as.

A program for test_matrix.py: it forms one process group and trains them all in it, so that ranks
and imports are paid once.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent / "recipes"))

from worlds import tokens, worlds

from launcher import Recipe, adamw, make_plan, read_machine, sgd
from launcher.rundir import RunDir, create_run_dir
from launcher.strategy import STRATEGIES
from launcher.world import find_world

WORLDS = (1, 2, 3, 4)
OPTIMIZERS = {
    "sgd": sgd(momentum=0.9, weight_decay=1e-4, decay_1d=False),
    "adamw": adamw(weight_decay=0.1),
}
RATES = {"sgd": 0.1, "adamw": 0.003}
CLIPPED = {"sgd": None, "adamw": 0.5}


@dataclass(frozen=True)
class Case:
    """One configuration on a number of ranks."""

    name: str
    strategy: str
    accumulation: int
    optimizer: str

    @property
    def key(self) -> str:
        return f"{self.name}-{self.strategy}-x{self.accumulation}-{self.optimizer}"

    def recipe(self, ranks: int) -> Recipe:
        """Return the recipe, with as many micro-batches as asked for in a whole batch."""
        base = {"worlds": worlds, "tokens": tokens}[self.name]()
        return replace(
            base,
            strategy=self.strategy,  # type: ignore[arg-type]
            micro_batch_size=-(-62 // (ranks * self.accumulation)),
            optimizer=OPTIMIZERS[self.optimizer],
            lr=RATES[self.optimizer],
            max_grad_norm=CLIPPED[self.optimizer],
            epochs=2,
        )


def cases(ranks: int) -> Iterator[Case]:
    """Yield the cases that a number of ranks can run."""
    if ranks == 1:
        yield Case("tokens", "ddp", 1, "adamw")  # what the others with tokens are compared with
    for strategy in STRATEGIES:
        if strategy == "fsdp" and ranks == 1:
            continue
        for accumulation in (1, 3):
            for optimizer in OPTIMIZERS:
                yield Case("worlds", strategy, accumulation, optimizer)
        yield Case("tokens", strategy, 3, "adamw")


def train_all(folder: Path) -> None:
    """Train each case into a folder of its own."""
    from launcher.engine.logs import Output
    from launcher.engine.run import join, train_rank

    world = find_world()
    output = Output(terminal=io.StringIO(), errors=io.StringIO(), log=io.StringIO())
    kept = []  # backends hold the process group, which is the same for all
    for case in cases(world.world_size):
        recipe = case.recipe(world.world_size)
        plan = make_plan(recipe, read_machine(), nproc_per_node=world.world_size)

        def make_run_dir(key: str = case.key) -> RunDir:
            return create_run_dir(folder / key, "case")

        backend, run_dir = join(recipe, plan, world, make_run_dir)
        train_rank(recipe, plan, backend, run_dir, output)
        kept.append(backend)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    train_all(Path(sys.argv[1]))
