"""One recipe on 1, 2 and 4 processes: what stays the same under launcher, and under others.

    python benchmarks/same_steps.py

Each program is compared with itself on one process. launcher runs the recipe as it is, under
several strategies; in fp64 as well, where rounding has next to nothing to grow from, and what is
left would be a difference. The others run it in the loop that their documentation shows, with the
recipe's batch size as that of the loader - so that the batch grows with the processes - and once
more with that divided by the processes by hand.
"""

from __future__ import annotations

import itertools
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click
import torch
from contest import CONTESTANTS, Names, Numbers, benchmark, installed, print_table, train

from launcher import Recipe
from launcher.checks.prove import TOLERANCES
from launcher.engine.probes.parity import Trace, compare, read_trace
from launcher.planning.strategy import STRATEGIES
from launcher.recipes.digits import digits

OTHERS = [name for name in CONTESTANTS if name not in ("launcher", "ignite", "fabric")]
HEAD = (
    "trained with",
    "processes",
    "steps",
    "samples a step",
    "sample ids",
    "learning rates",
    "losses",
    "weights",
    "held-out accuracy",
)


@benchmark
@click.option("--worlds", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--strategies", type=Names(STRATEGIES), default="ddp,fsdp,zero2", show_default=True)
@click.option("--epochs", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--only", type=Names(["launcher", *OTHERS]), default=",".join(["launcher", *OTHERS]))
def main(worlds: list[int], strategies: list[str], epochs: int, only: list[str]) -> None:
    """Print, for each framework and number of processes, how a run differs from one process's."""
    names = installed(only)
    worlds = [world for world in worlds if world > 1]
    folder = Path(tempfile.mkdtemp(prefix="same_steps-"))
    try:
        print_table(
            HEAD,
            rows(names, worlds, strategies, epochs, folder),
            title=f"recipes/digits.py, {epochs} epochs, compared with 1 process of the same",
        )
    finally:
        shutil.rmtree(folder)


def rows(
    names: list[str], worlds: list[int], strategies: list[str], epochs: int, folder: Path
) -> Iterator[list[str]]:
    """Train, and yield a row for each run."""
    recipe = digits()
    batch = recipe.batch_size
    assert batch is not None

    def trained(name: str, ranks: int, *settings: str, size: int = batch) -> Trace:
        run_dir = train(
            name,
            "digits",
            folder / "-".join([name, str(ranks), str(size), *settings]),
            ranks=ranks,
            settings=[f"epochs={epochs}", *settings],
            options=[f"--batch-size={size}"],
        )
        return read_trace(run_dir)

    for name in names:
        title = CONTESTANTS[name].title
        if name == "launcher":
            for precision in ("fp32", "fp64"):
                settings = ("record_samples=true", f"precision={precision}")
                alone = trained(name, 1, *settings)
                yield row(f"{title}, {precision}", 1, alone, alone, recipe)
                for ranks, strategy in itertools.product(worlds, strategies):
                    if precision == "fp64" and STRATEGIES[strategy].backend == "deepspeed":
                        continue  # which has fp32 weights
                    found = trained(name, ranks, *settings, f"strategy={strategy}")
                    yield row(f"{title}, {precision}, {strategy}", ranks, alone, found, recipe)
            continue
        alone = trained(name, 1)
        yield row(title, 1, alone, alone, recipe)
        for ranks, size in itertools.product(worlds, (batch, 0)):
            own = size or batch // ranks
            found = trained(name, ranks, size=own)
            yield row(f"{title}, {own} per process", ranks, alone, found, recipe)


def row(title: str, ranks: int, alone: Trace, found: Trace, recipe: Recipe) -> list[str]:
    """Return the cells of one run."""
    cells = [title, str(ranks), str(len(found.loss)), str(len(found.samples[0]))]
    if found is alone:
        cells += ["", "", "", ""]
    else:
        difference = compare(alone, found, TOLERANCES["fp32"])
        cells += [
            f"from step {difference.unequal[name]}" if name in difference.unequal else "="
            for name in ("sample ids", "learning rate")
        ]
        cells += [f"{value:.1e}" for value in (difference.loss, difference.weights)]
    return [*cells, f"{accuracy(recipe, found):.1%}"]


@torch.no_grad()
def accuracy(recipe: Recipe, trace: Trace) -> float:
    """Return the share of held-out digits that the final weights recognise."""
    model = recipe.model()
    model.load_state_dict(trace.weights)
    images, labels = recipe.data().evaluation.tensors
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
