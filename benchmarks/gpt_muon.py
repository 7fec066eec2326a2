"""Count the steps that Muon needs to the loss of tuned AdamW, on a small GPT.

    python benchmarks/gpt_muon.py --out gpt_muon.json

Claim: Muon on the matrices of a transformer's blocks reaches the loss of AdamW in fewer steps, and
takes the same steps on any number of ranks. Both train the recipe `gpt` at a small size, with the
same batch, schedule, clipping and data. AdamW has the best of --adamw-lrs at its full length, which
is the target; Muon has the best of --muon-lrs in the middle one of its lengths. A schedule spans
the steps of its training, so that each length is a training of its own. The second table compares
the losses of Muon on several numbers of ranks with those on one, under every strategy.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

import click
from contest import HERE, Cell, Numbers, benchmark, print_table, train
from trainings import Trainings

from launcher.engine.probes.parity import compare, read_trace
from launcher.planning.strategy import STRATEGIES

SIZE = ("layers=2", "width=64", "heads=2", "batch_size=16", "lr_batch_size=16")
TEXTS = HERE.parent / "launcher"
"""The source of launcher, whose held-out part is evaluated in a second."""

TOLERANCE = 1e-5
COMPARED_STEPS = 20
COMPARED_HEAD = ("strategy", "ranks", "losses differ by", "weights differ by")


@benchmark
@click.option("--steps", type=click.IntRange(min=10), default=300, show_default=True)
@click.option("--lengths", type=Numbers(float, 0.05), default="0.2,0.25,0.3,0.4")
@click.option("--adamw-lrs", type=Numbers(float, 0), default="0.001,0.002,0.004,0.008")
@click.option("--muon-lrs", type=Numbers(float, 0), default="0.016,0.032,0.064")
@click.option("--seeds", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--worlds", type=Numbers(int, 1), default="1,2,4", show_default=True)
@click.option("--data", type=click.Path(path_type=Path), default=TEXTS, help="Folder of texts.")
@click.option("--out", type=click.Path(path_type=Path), help="Cache finished trainings in FILE.")
def main(
    steps: int,
    lengths: list[float],
    adamw_lrs: list[float],
    muon_lrs: list[float],
    seeds: int,
    worlds: list[int],
    data: Path,
    out: Path | None,
) -> None:
    """Print the steps and the loss of each length, and the losses on each number of ranks."""
    size = [*SIZE, f"data={data}"]
    folder = Path(tempfile.mkdtemp(prefix="gpt_muon-"))
    adamw_cache, muon_cache = (None, None) if out is None else (out, out.with_suffix(".muon.json"))
    try:
        with (
            Trainings("gpt", adamw_cache, metric="bits_per_byte") as adamw,
            Trainings("gpt:gpt_muon", muon_cache, metric="bits_per_byte") as muon,
        ):
            budgets = [round(length * steps) for length in lengths]
            lr = best_lr(adamw, adamw_lrs, steps, size)
            target = adamw.final(steps, range(seeds), f"lr={lr}", *size)
            muon_lr = best_lr(muon, muon_lrs, budgets[len(budgets) // 2], size)
            rows: list[list[Cell]] = [row(f"AdamW, best lr {lr:g}", steps, steps, target)]
            for budget in budgets:
                values = muon.final(budget, range(seeds), f"lr={muon_lr}", *size)
                rows.append(row(f"Muon, best lr {muon_lr:g}", steps, budget, values))
            head = ("trained with", "steps", "times fewer", "bits per held-out byte", "seeds")
            print_table(head, rows)
        title = f"Muon, {COMPARED_STEPS} steps, against one rank"
        print_table(COMPARED_HEAD, compared(folder, worlds, [f"lr={muon_lr}", *size]), title=title)
    finally:
        shutil.rmtree(folder)


def best_lr(trainings: Trainings, lrs: list[float], steps: int, size: list[str]) -> float:
    """Return the learning rate with the lowest final loss."""
    return min(lrs, key=lambda lr: trainings.final(steps, [0], f"lr={lr}", *size)[0])


def row(title: str, base: int, steps: int, values: list[float]) -> list[Cell]:
    """Return the cells of a training: its steps, and its final losses."""
    spread = f"{min(values):.3f} to {max(values):.3f}"
    return [title, f"{steps:,}", (base / steps, ".2f"), (fmean(values), ".3f"), spread]


def compared(folder: Path, worlds: list[int], settings: list[str]) -> Iterator[list[Cell]]:
    """Train on each number of ranks, and yield a row for each strategy.

    Raises:
        click.ClickException: Losses differ by more than rounding.
    """
    reference = None
    for ranks in worlds:
        for strategy in STRATEGIES if ranks > 1 else ("ddp",):
            run_dir = train(
                "launcher",
                "gpt:gpt_muon",
                folder / f"{strategy}-{ranks}",
                ranks=ranks,
                settings=[
                    *settings,
                    f"steps={COMPARED_STEPS}",
                    f"strategy={strategy}",
                    "record_samples=true",
                ],
                options=[],
            )
            trace = read_trace(run_dir)
            if reference is None:
                reference = trace
                continue
            difference = compare(reference, trace, TOLERANCE)
            yield [strategy, str(ranks), (difference.loss, ".1e"), (difference.weights, ".1e")]
            if not difference.loss <= TOLERANCE:
                raise click.ClickException(f"{strategy} on {ranks}: a loss differs.")


if __name__ == "__main__":
    main()
