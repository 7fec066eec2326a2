"""Compare one recipe on 1, 2 and 4 processes, under launcher and under other frameworks.

    python benchmarks/same_steps.py

Claim: under launcher the number of processes changes neither samples, learning rates, losses nor
weights; under the other frameworks it does. Each framework is compared with itself on one process.
launcher runs the unchanged recipe under several strategies, and also in fp64, where rounding is too
small to hide a real difference. The others run the recipe in the loop that their documentation
shows: once with the recipe's batch size in each process, so that the global batch grows with the
processes, and once with that batch size divided by the number of processes.
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
    """Print how the run of each framework on several processes differs from that on one."""
    names = installed(only)
    worlds = [world for world in worlds if world > 1]
    folder = Path(tempfile.mkdtemp(prefix="same_steps-"))
    try:
        print_table(
            HEAD,
            table_rows(names, worlds, strategies, epochs, folder),
            title=f"recipes/digits.py, {epochs} epochs, compared with 1 process of the same",
        )
    finally:
        shutil.rmtree(folder)


def table_rows(
    names: list[str], worlds: list[int], strategies: list[str], epochs: int, folder: Path
) -> Iterator[list[str]]:
    """Train each combination, and yield a row of cells for each run."""
    recipe = digits()
    batch = recipe.batch_size
    assert batch is not None

    def trace_of(name: str, ranks: int, *settings: str, size: int = batch) -> Trace:
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
                reference = trace_of(name, 1, *settings)
                yield row(f"{title}, {precision}", 1, reference, reference, recipe)
                for ranks, strategy in itertools.product(worlds, strategies):
                    if precision == "fp64" and STRATEGIES[strategy].backend == "deepspeed":
                        continue  # DeepSpeed keeps its weights in fp32
                    trace = trace_of(name, ranks, *settings, f"strategy={strategy}")
                    yield row(f"{title}, {precision}, {strategy}", ranks, reference, trace, recipe)
            continue
        reference = trace_of(name, 1)
        yield row(title, 1, reference, reference, recipe)
        for ranks in worlds:
            for size in (batch, batch // ranks):
                trace = trace_of(name, ranks, size=size)
                yield row(f"{title}, {size} per process", ranks, reference, trace, recipe)


def row(title: str, ranks: int, reference: Trace, trace: Trace, recipe: Recipe) -> list[str]:
    """Return the cells of one run: how its trace differs from that of one process."""
    cells = [title, str(ranks), str(len(trace.loss)), str(len(trace.samples[0]))]
    if trace is reference:
        cells += ["", "", "", ""]
    else:
        difference = compare(reference, trace, TOLERANCES["fp32"])
        cells += [
            f"from step {difference.unequal[name]}" if name in difference.unequal else "="
            for name in ("sample ids", "learning rate")
        ]
        cells += [f"{value:.1e}" for value in (difference.loss, difference.weights)]
    return [*cells, f"{accuracy(recipe, trace):.1%}"]


@torch.no_grad()
def accuracy(recipe: Recipe, trace: Trace) -> float:
    """Return the share of held-out digits that the final weights classify correctly."""
    model = recipe.model()
    model.load_state_dict(trace.weights)
    images, labels = recipe.data().evaluation.tensors
    return float((model(images).argmax(1) == labels).float().mean())


if __name__ == "__main__":
    main()
