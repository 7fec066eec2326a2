"""Compare the bits of finished runs on 1, 2, 3, 4, 5 and 8 processes.

    python benchmarks/same_bits.py

Claim: a recipe with `virtual_ranks=8 exact=true` has the same weights, optimizer state and
BatchNorm statistics, to the bit, on any number of processes up to 8, under DDP and FSDP, and after
a resume on another number of processes. The other frameworks run the same model in the loop that
their documentation shows, with the batch divided by the number of processes; the table shows by how
much their weights differ from those of one process.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import click
from contest import BIN, CONTESTANTS, HERE, Names, Numbers, benchmark, installed, print_table, train
from parts import norms

from launcher.checks.prove import TOLERANCES
from launcher.engine.probes.parity import checkpoint_digest, compare, read_trace
from launcher.runs.checkpoints import list_checkpoints
from launcher.runs.rundir import RunDir

OTHERS = ("torch", "accelerate", "lightning", "hf")
CLIPPED = ("optimizer=adamw(weight_decay=0.1)", "lr=0.003", "max_grad_norm=0.5")
KERNELS = ('optimizer=muon(adjust="original", others=sgd(), others_lr=2.5)', "lr=0.04")


class Workload(NamedTuple):
    """A recipe of parts.py with settings."""

    title: str
    recipe: str
    settings: tuple[str, ...] = ()


WORKLOADS = {
    "sgd": Workload("BatchNorm and dropout, SGD", "norms"),
    "adamw": Workload("BatchNorm and dropout, AdamW, clipping", "norms", CLIPPED),
    "text": Workload("words of ragged texts, AdamW, clipping", "text"),
    "accumulation": Workload("accumulation in a virtual rank", "norms", ("micro_batch_size=3",)),
    "bf16": Workload("bf16", "text", ("precision=bf16",)),
    "fp16": Workload("fp16", "text", ("precision=fp16",)),
    "compile": Workload("compile", "text", ("compile=true",)),
    "muon": Workload("words of ragged texts, Muon", "text", ("optimizer=muon()",)),
    "kernels": Workload("BatchNorm and dropout, Muon on the kernels", "norms", KERNELS),
}
"""What is trained, by the names that --workloads takes."""

STRATEGIES = ("ddp", "fsdp")
SHOWN_DIGITS = 8
MIDDLE = 16
"""Step of the checkpoint from which runs are resumed on another number of processes."""


@benchmark
@click.option("--worlds", type=Numbers(int, 1), default="1,2,3,4,5,8", show_default=True)
@click.option("--strategies", type=Names(STRATEGIES), default="ddp,fsdp", show_default=True)
@click.option("--only", type=Names(OTHERS), default=",".join(OTHERS), show_default=True)
@click.option("--workloads", type=Names(WORKLOADS), default=",".join(WORKLOADS))
def main(worlds: list[int], strategies: list[str], only: list[str], workloads: list[str]) -> None:
    """Print the first digits of the SHA-256 of each run's state after 30 steps."""
    folder = Path(tempfile.mkdtemp(prefix="same_bits-"))
    try:
        print_table(
            ("workload", "strategy", *map(str, worlds), "resumed"),
            digest_rows(workloads, worlds, strategies, folder),
            title="SHA-256 of weights, optimizer state and buffers after 30 steps, by processes",
        )
        print_table(
            ("trained with", *(f"{world} processes" for world in worlds if world > 1)),
            other_rows(installed(only), worlds, folder),
            title="largest relative difference of a weight from 1 process, BatchNorm and dropout",
        )
    finally:
        shutil.rmtree(folder)


def digest_rows(
    names: list[str],
    worlds: list[int],
    strategies: list[str],
    folder: Path,
) -> Iterator[list[str]]:
    """Train each workload on each number of processes, and yield a row for each strategy."""
    for name in names:
        title, recipe, settings = WORKLOADS[name]
        for strategy in strategies:
            cells, first = [], None
            for world in worlds:
                if strategy == "fsdp" and world == 1:
                    cells.append("")
                    continue
                run_dir = train(
                    "launcher",
                    f"{HERE / 'parts.py'}:{recipe}",
                    folder / f"{name}-{len(cells)}-{strategy}",
                    ranks=world,
                    settings=[*settings, f"strategy={strategy}", f"checkpoint_every={MIDDLE}"],
                    options=[],
                )
                first = first or run_dir
                cells.append(digest(run_dir))
            assert first is not None
            yield [title, strategy, *cells, digest(resume(first, max(worlds)))]


def resume(run_dir: RunDir, ranks: int) -> RunDir:
    """Return a copy of a run, continued from its middle on another number of processes."""
    import subprocess

    copy = run_dir.path.with_name(f"{run_dir.path.name}-resumed")
    shutil.copytree(run_dir.path, copy)
    command = [str(BIN / "launcher"), "resume", str(copy), "-n", str(ranks), "--from", str(MIDDLE)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise click.ClickException(done.stdout + done.stderr)
    return RunDir(copy)


def digest(run_dir: RunDir) -> str:
    """Return the first digits of the SHA-256 of a run's last checkpoint."""
    return checkpoint_digest(list_checkpoints(run_dir)[0])[:SHOWN_DIGITS]


def other_rows(names: list[str], worlds: list[int], folder: Path) -> Iterator[list[str]]:
    """Train the first recipe with each other framework, and yield a row for each."""
    batch = norms().batch_size
    assert batch is not None
    for name in names:
        cells, reference = [], None
        for world in sorted({1, *worlds}):
            run_dir = train(
                name,
                f"{HERE / 'parts.py'}:norms",
                folder / f"{name}-{world}",
                ranks=world,
                settings=["virtual_ranks=none", "exact=false"],
                options=[f"--batch-size={batch // world}"],
            )
            trace = read_trace(run_dir)
            if reference is None:
                reference = trace
                continue
            cells.append(f"{compare(reference, trace, TOLERANCES['fp32']).weights:.1e}")
        yield [CONTESTANTS[name].title, *cells]


if __name__ == "__main__":
    main()
